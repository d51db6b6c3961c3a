from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastsae_kernels._row_grads import PairGrad, RowGrad
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.optimizer.merge import touched_rows
from fastsae_kernels.optimizer.update import RowState, Rule, step_tensor, update_rows

# A block's gradient stays in the last-level cache. Smaller blocks divide worse over threads, since
# a latent that fires on every row is one thread's work; measured from 1 to 40 MiB.
BLOCK_BYTES = 8 << 20


def row_adam(state: RowState, grads: Sequence[RowGrad], rule: Rule) -> None:
    steps = step_tensor(state, rule)
    for start, stop, g in _gradient_blocks(state.weight, _scaled(grads, rule)):
        rows = torch.arange(start, stop, device=g.device)
        update_rows(state.part(slice(start, stop)), g, rows, rule, steps)


def lazy_row_adam(state: RowState, grads: Sequence[RowGrad], rule: Rule) -> None:
    steps = step_tensor(state, rule)
    touched = touched_rows(grads, len(state.weight))
    for start, stop, g in _gradient_blocks(state.weight, _scaled(grads, rule)):
        here = touched[start:stop].nonzero().squeeze(1)
        block = state.part(slice(start, stop))
        moved = block.part(here)
        update_rows(moved, g[here], here + start, rule, steps)
        for whole, part in zip(block.tensors(), moved.tensors(), strict=True):
            whole.index_copy_(0, here, part)


def row_grad_norm(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    n_rows = len(weight)
    if len(grads) == 1 and isinstance(grads[0], PairGrad):
        grads = [grads[0].touched()]
        n_rows = len(grads[0].groups.offsets) - 1
    blocks = (g.reshape(-1) for *_, g in _gradient_blocks(weight[:n_rows], grads))
    squares = [torch.dot(g, g) for g in blocks] or [weight.new_zeros(())]
    return torch.stack(squares).sum().sqrt()


def _scaled(grads: Sequence[RowGrad], rule: Rule) -> Sequence[RowGrad]:
    return grads if rule.grad_scale is None else [grad.scaled(rule.grad_scale) for grad in grads]


def _widened(grad: PairGrad) -> PairGrad:
    return replace(grad, operand=grad.operand.to(grad.coef.dtype))


def _gradient_blocks(weight: Tensor, grads: Sequence[RowGrad]) -> Iterator[tuple[int, int, Tensor]]:
    # Here and not at each block: the sums read operands in the dtype of their coefficients.
    grads = [_widened(grad) if isinstance(grad, PairGrad) else grad for grad in grads]
    block = min(BLOCK_BYTES, workspace_bytes() // 16)
    size = max(1, block // (weight.shape[1] * weight.element_size()))
    for start in range(0, len(weight), size):
        stop = min(start + size, len(weight))
        parts = [grad.block(start, stop) for grad in grads]
        total = parts[0] if parts else torch.zeros_like(weight[start:stop])
        for part in parts[1:]:
            total = total + part
        yield start, stop, total
