"""Adam's state in 8 bits and weights that are bf16 masters: a block of rows is widened, stepped and
written back, so that only a block exists in fp32.

A moment of n rows is n scales, the largest of each row, and one of 256 codes an element: Dettmers
et al. 2022, arXiv 2110.02861, whose dynamic map holds seven decades in steps of 1 to 20 %, with a
latent as the block. Steps of that size swallow a change of a thousandth, so a number is rounded to
one of its two neighbours with the probability of its nearness to it, by bits that are a hash of
element and step (see `fastsae_kernels.optimizer.rounding`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import DenseGrad, RowGrad, row_adam
from fastsae_kernels.optimizer.rounding import hash_bits, stochastic_round

MOMENTS = ("exp_avg", "exp_avg_sq")
DECADES = 7
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
    state = {name: torch.zeros_like(p, dtype=torch.uint8) for name in MOMENTS}
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
            levels = codes(name, values.device)
            values = levels[values.int()] * state[f"{name}_scale"][block, None]
        found.append(values)
    return found


def _write(state: dict[str, Tensor], block: slice, moments: list[Tensor], bits: Tensor) -> None:
    for name, values, shift in zip(MOMENTS, moments, (0, 16), strict=True):
        target, chosen = state[name][block], bits >> shift & 0xFFFF
        if f"{name}_scale" in state:
            scale = values.abs().amax(1)
            state[f"{name}_scale"][block] = scale
            target.copy_(_coded(values / scale[:, None].clamp_min(1e-38), name, chosen))
        elif target.dtype == torch.bfloat16:
            target.copy_(stochastic_round(values, chosen))
        else:
            target.copy_(values)


def _coded(values: Tensor, name: str, bits: Tensor) -> Tensor:
    """The code below or above each value in [-1, 1], by chance and right on average."""
    levels = codes(name, values.device)
    below = (torch.searchsorted(levels, values, right=True) - 1).clamp(0, len(levels) - 2)
    nearness = (values - levels[below]) / (levels[below + 1] - levels[below])
    return (below + (bits < (nearness * 0x10000).round())).to(torch.uint8)


@cache
def codes(name: str, device: torch.device) -> Tensor:
    """Ascending, 255 of the first moment and 254 of the second: what their codes stand for.

    Evenly spaced steps up to 1, to 0.1, ..: half as many a decade down. A second moment's smallest
    is above 0: one rounded to 0 beside a first moment that is not would make a step without bound.
    """
    signed = name == "exp_avg"
    steps = [2**i if signed else 2 ** (i + 1) for i in range(DECADES)]
    positive = torch.cat(
        [
            torch.linspace(0.1, 1.0, n + 1)[1:] * 10.0 ** (i - DECADES + 1)
            for i, n in enumerate(steps)
        ]
    )
    levels = torch.cat([-positive.flip(0), torch.zeros(1), positive]) if signed else positive
    return levels.to(device)
