from collections.abc import Sequence

from torch import Tensor

from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels._row_grads import RowGrad


def row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> None:
    """One Adam step of a dictionary's rows, in place, without its dense gradient ever existing.

        g = grad_scale * sum of grads;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        weight -= lr * (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    The gradient of a block of rows is summed, used and discarded while it is in cache. Every row
    moves, touched or not: the numbers are those of `torch.optim.Adam`.

    Args:
        weight, exp_avg, exp_avg_sq: [F, D], contiguous, fp32 or fp64.
        grads: what backward left in `weight.row_grads`.
        step: number of this step, from 1.
        grad_scale: 0-dim factor on the gradient (clipping), or None for 1.
        impl: `auto`, `eager` or `reference`.

    Raises:
        ValueError: the three tensors' shapes or memory orders differ, or `step` is under 1.
    """
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if state.shape != weight.shape or state.stride() != weight.stride():
            raise ValueError(
                f"{name} must have weight's shape and strides {list(weight.shape)}, "
                f"{weight.stride()}, got {list(state.shape)}, {state.stride()}"
            )
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [F, D], got strides {weight.stride()}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if resolve_impl(impl, weight.device) is Impl.REFERENCE:
        from fastsae_kernels.optimizer.reference import row_adam as run
    else:
        from fastsae_kernels.optimizer.eager import row_adam as run
    run(weight, grads, exp_avg, exp_avg_sq, step, lr, betas, eps, grad_scale)


def row_grad_norm(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    """0-dim Euclidean norm of the summed gradient of `weight` [F, D], block by block."""
    from fastsae_kernels.optimizer.eager import row_grad_norm as run

    return run(weight, grads)
