from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels._row_grads import DenseGrad, PairGrad, RowGrad


def row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
    project: bool,
    renormalise: bool,
    copy: Tensor | None,
) -> None:
    g = _total(weight, grads)
    g = g if grad_scale is None else g * grad_scale
    if project:
        unit = _unit_rows(weight)
        g = g - (g * unit).sum(1, keepdim=True) * unit
    exp_avg.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    weight.sub_(lr * (exp_avg / (1 - betas[0] ** step)) / denominator)
    if renormalise:
        weight.copy_(_unit_rows(weight))
    if copy is not None:
        copy.copy_(weight)


def lazy_row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None,
    **options: Any,
) -> None:
    touched = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for grad in grads:
        if isinstance(grad, PairGrad):
            touched |= grad.groups.counts() > 0
        elif isinstance(grad, DenseGrad):
            touched[:] = True
        else:
            touched[grad.latents] = True
    state = [t for t in (weight, exp_avg, exp_avg_sq, copy) if t is not None]
    before = [t.clone() for t in state]
    row_adam(weight, grads, exp_avg, exp_avg_sq, copy=copy, **options)
    for now, old in zip(state, before, strict=True):
        now.copy_(torch.where(touched.unsqueeze(1), now, old))


def row_grad_norm(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    return _total(weight, grads).norm()


def _total(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    return sum((grad.block(0, len(weight)) for grad in grads), start=torch.zeros_like(weight))


def _unit_rows(weight: Tensor) -> Tensor:
    norm = weight.norm(dim=1, keepdim=True)
    return torch.where(norm == 0, weight, weight / norm)
