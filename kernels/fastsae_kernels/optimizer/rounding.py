"""Moments in bf16, written with stochastic rounding.

bf16 keeps 8 significant bits, so a number moves only when it is changed by more than 1/512 of
itself. A second moment changes by 1 - b2 of itself or less near its goal: with b2 = 0.999 it would
stand still if rounded to nearest, and never decay once the gradient fell. Rounding up with the
probability of the part cut off is right on average. The random bits are a hash of row, column and
step, so a step repeated gives the same bits; the first moment takes the lower sixteen, the second
the upper. `optimizer/kernel.py` computes the same hash.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def store_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, m: Tensor, v: Tensor, rows: Tensor, step: int
) -> None:
    """Write m and v [n, D] to the moments of these rows [n]; a moment that is m or v stays."""
    targets = [(exp_avg, m, 0), (exp_avg_sq, v, 16)]
    targets = [target for target in targets if target[0] is not target[1]]
    if any(moment.dtype == torch.bfloat16 for moment, *_ in targets):
        bits = hash_bits(rows, m.shape[1], step)
        for moment, value, shift in targets:
            moment.copy_(stochastic_round(value.float(), bits >> shift & 0xFFFF))
    else:
        for moment, value, _ in targets:
            moment.copy_(value)


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """bf16: fp32 `values` rounded up in magnitude if their last 16 bits plus `bits` overflow."""
    raised = values.contiguous().view(torch.int32) + bits.to(torch.int32)
    # What is added to a NaN's payload may turn it into a number.
    kept = torch.where(values.isnan(), values, (raised & -0x10000).view(torch.float32))
    return kept.to(torch.bfloat16)


def hash_bits(rows: Tensor, n_cols: int, step: int) -> Tensor:
    """[n, D] int64 holding 32 random bits for each row in `rows` [n] and each column."""
    start = _mix(torch.full((1,), step, device=rows.device))
    keys = _mix((start + rows.long()) & _WORD)
    columns = torch.arange(n_cols, device=rows.device)
    return _mix((keys.unsqueeze(1) + columns) & _WORD)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit depends on every other (lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    # 0x846CA68B less 2^32: the low words of the product are the same and int64 cannot overflow.
    x = (x * (0x846CA68B - (1 << 32))) & _WORD
    return x ^ (x >> 16)
