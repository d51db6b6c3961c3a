"""The update of some rows in plain PyTorch, once their gradient is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.optimizer.rounding import store_moments


class RowState(NamedTuple):
    """What a step changes, [F, D] or some rows of it."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def part(self, rows: slice | Tensor) -> "RowState":
        """Some rows: views for a slice, copies for their numbers."""
        copy = None if self.copy is None else self.copy[rows]
        return RowState(self.weight[rows], self.exp_avg[rows], self.exp_avg_sq[rows], copy)


class Rule(NamedTuple):
    """How a step changes it."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    grad_scale: Tensor | None
    project: bool
    renormalise: bool


def step_tensor(state: RowState, rule: Rule) -> Tensor:
    """0-dim: the step as torch's kernel wants it."""
    return torch.full((), float(rule.step), device=state.weight.device)


def update_rows(state: RowState, g: Tensor, rows: Tensor, rule: Rule, steps: Tensor) -> None:
    """Update some rows in place.

    Args:
        state: n rows, contiguous.
        g: their gradient [n, D], already scaled.
        rows: [n], their numbers in the whole weight: they choose the random bits of bf16 moments.
        steps: `step_tensor`, made once for all blocks.
    """
    wide = torch.promote_types(state.weight.dtype, torch.float32)
    w, m, v = (t.to(wide) for t in (state.weight, state.exp_avg, state.exp_avg_sq))
    g = g.to(wide)
    if rule.project:
        square = w.square().sum(1, keepdim=True)
        along = (g * w).sum(1, keepdim=True) / square.masked_fill(square == 0, 1)
        g = torch.addcmul(g, w, along, value=-1)
    # What torch.optim.Adam(fused=True) runs; its public form would also count up the step.
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [w],
        [g],
        [m],
        [v],
        [],
        [steps],
        lr=rule.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=0.0,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )
    if rule.renormalise:
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        w.div_(norm.masked_fill(norm == 0, 1))
    store(state, w, m, v, rows, rule.step)


def store(state: RowState, w: Tensor, m: Tensor, v: Tensor, rows: Tensor, step: int) -> None:
    """Write rows that were widened for the arithmetic; those that are `state`'s own stay."""
    if w is not state.weight:
        state.weight.copy_(w)
    store_moments(state.exp_avg, state.exp_avg_sq, m, v, rows, step)
    if state.copy is not None:
        state.copy.copy_(w)
