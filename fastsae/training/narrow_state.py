"""Adam's state in 8 bits and weights that are bf16 masters: a block of rows is widened, stepped and
written back, so that only a block exists in fp32.

A moment of n rows in 8 bits is n scales, which map the largest of each row to the largest number
of the format, and elements in e4m3 (the first moment, steps of 1/8) or e5m2 (the second, steps of
1/4 over 32 binades). Steps of that size swallow a change of a thousandth, so numbers are rounded up
with the probability of the part cut off, by bits that are a hash of element and step: right on
average, as `fastsae_kernels.optimizer.rounding` has it for bf16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import DenseGrad, RowGrad, row_adam
from fastsae_kernels.optimizer.rounding import hash_bits, stochastic_round

MOMENTS = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e5m2}
"""The moments, and what they are in 8 bits."""
MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
"""Bits after the leading one."""
BLOCK_BYTES = 8 << 20
"""Of a block in fp32; a gradient, a weight and two moments of it exist at once."""
WEIGHT_BITS = 1 << 30
"""Added to the step: the bits that round a weight are not those that round its moments."""


def new_moments(p: Tensor, kind: str) -> dict[str, Tensor]:
    """Moments of zeros of a weight [F, D] or [D, F], in its memory order."""
    if kind != "8bit":
        dtype = torch.bfloat16 if kind == "bfloat16" else p.dtype
        return {name: torch.zeros_like(p, dtype=dtype) for name in MOMENTS}
    n_rows = p.shape[1] if p.stride(0) == 1 and p.shape[0] != 1 else p.shape[0]
    state = {name: torch.zeros_like(p, dtype=dtype) for name, dtype in MOMENTS.items()}
    scales = {f"{name}_scale": torch.zeros(n_rows, device=p.device) for name in MOMENTS}
    return state | scales


def step_in_blocks(
    weight: Tensor,
    grads: Sequence[RowGrad],
    state: dict[str, Tensor],
    *,
    round_weight: bool,
    copy: Tensor | None,
    step: int,
    grad_scale: Tensor | None,
    **options: Any,
) -> None:
    """`row_adam` on weight [F, D], contiguous, whose state is 8 bits or whose master is bf16.

    Args:
        state: moments [F, D] in weight's memory order, and `.._scale` [F] of 8-bit ones.
        round_weight: write a bf16 weight with stochastic rounding, else to nearest.
        options: as in `row_adam`.
    """
    size = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), size):
        block = slice(start, min(start + size, len(weight)))
        rows = torch.arange(block.start, block.stop, device=weight.device)
        w, *moments = (t.float() for t in (weight[block], *_read(state, block)))
        gradient = torch.zeros_like(w)
        for grad in grads:
            gradient += grad.block(block.start, block.stop)
        row_adam(
            w,
            [DenseGrad(gradient)],
            *moments,
            step=step,
            grad_scale=grad_scale,
            copy=None if copy is None else copy[block],
            **options,
        )
        _write(state, block, moments, hash_bits(rows, w.shape[1], step))
        if round_weight:
            bits = hash_bits(rows, w.shape[1], step + WEIGHT_BITS) & 0xFFFF
            w = stochastic_round(w, bits)
        weight[block].copy_(w)


def _read(state: dict[str, Tensor], block: slice) -> list[Tensor]:
    found = []
    for name in MOMENTS:
        values = state[name][block]
        if f"{name}_scale" in state:
            values = values.float() * state[f"{name}_scale"][block, None]
        found.append(values)
    return found


def _write(state: dict[str, Tensor], block: slice, moments: list[Tensor], bits: Tensor) -> None:
    for name, values, shift in zip(MOMENTS, moments, (0, 16), strict=True):
        target, chosen = state[name][block], bits >> shift & 0xFFFF
        if f"{name}_scale" in state:
            scale = values.abs().amax(1) / torch.finfo(target.dtype).max
            state[f"{name}_scale"][block] = scale
            target.copy_(_in_8_bits(values / scale[:, None].clamp_min(1e-38), target.dtype, chosen))
        elif target.dtype == torch.bfloat16:
            target.copy_(stochastic_round(values, chosen))
        else:
            target.copy_(values)


def _in_8_bits(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """fp32 `values` within the range of `dtype`, rounded by 16 random bits each.

    A second moment above 0 stays above: one of 0 beside a first moment that is not would make a
    step without bound.
    """
    kept = MANTISSA[dtype]
    raised = values.view(torch.int32) + (bits << (7 - kept)).to(torch.int32)
    rounded = (raised & -(1 << (23 - kept))).view(torch.float32)
    if dtype == MOMENTS["exp_avg_sq"]:
        rounded = torch.where(values > 0, rounded.clamp_min(torch.finfo(dtype).smallest_normal), 0)
    return torch.where(values.isnan(), values, rounded).to(dtype)
