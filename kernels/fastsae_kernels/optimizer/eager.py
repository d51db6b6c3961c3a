from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsae_kernels._row_grads import PairGrad, RowGrad
from fastsae_kernels._workspace import workspace_bytes

# A block's gradient stays in the last-level cache. Smaller blocks divide worse over threads, since
# a latent that fires on every row is one thread's work; measured from 1 to 40 MiB.
BLOCK_BYTES = 8 << 20


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
    steps = torch.tensor(float(step), device=weight.device)
    if grad_scale is not None:
        grads = [grad.scaled(grad_scale) for grad in grads]
    for start, stop, g in _gradient_blocks(weight, grads):
        # What torch.optim.Adam(fused=True) runs; its public form would also count up the step.
        torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
            [weight[start:stop]],
            [g],
            [exp_avg[start:stop]],
            [exp_avg_sq[start:stop]],
            [],
            [steps],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


@torch.no_grad()
def row_grad_norm(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    n_rows = len(weight)
    if len(grads) == 1 and isinstance(grads[0], PairGrad):
        grads = [grads[0].touched()]
        n_rows = len(grads[0].groups.offsets) - 1
    blocks = (g.reshape(-1) for *_, g in _gradient_blocks(weight[:n_rows], grads))
    squares = [torch.dot(g, g) for g in blocks] or [weight.new_zeros(())]
    return torch.stack(squares).sum().sqrt()


def _gradient_blocks(weight: Tensor, grads: Sequence[RowGrad]) -> Iterator[tuple[int, int, Tensor]]:
    block = min(BLOCK_BYTES, workspace_bytes() // 16)
    size = max(1, block // (weight.shape[1] * weight.element_size()))
    for start in range(0, len(weight), size):
        stop = min(start + size, len(weight))
        parts = [grad.block(start, stop) for grad in grads]
        total = parts[0] if parts else torch.zeros_like(weight[start:stop])
        for part in parts[1:]:
            total = total + part
        if total.shape != weight[start:stop].shape:
            raise ValueError(
                f"grads must be of weight's rows {list(weight[start:stop].shape)}, "
                f"got {list(total.shape)}; is weight [F, D]?"
            )
        yield start, stop, total.to(weight.dtype)
