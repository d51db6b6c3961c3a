from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae_kernels._row_grads import RowGrad


@torch.no_grad()
def row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
) -> None:
    blocks = (grad.block(0, len(weight)) for grad in grads)
    g = sum(blocks, start=torch.zeros_like(weight))
    g = g if grad_scale is None else g * grad_scale
    exp_avg.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    weight.sub_(lr * (exp_avg / (1 - betas[0] ** step)) / denominator)
