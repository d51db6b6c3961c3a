"""Rows that no program can hold, updated on a GPU by PyTorch, block by block.

Whole rows of more than `kernel.MAX_COLUMNS` columns do not fit into registers. Blocks of them take
their gradient from a buffer of `WIDE_BYTES` and are updated exactly, at several times the traffic,
without a host synchronisation. A weight without pairs and with one column a row (a bias) goes that
way too: a program a number would take longer.
"""

import torch
from torch import Tensor

from fastsae_kernels.grouping.kernel import segment_sum
from fastsae_kernels.optimizer.merge import MergedGrad
from fastsae_kernels.optimizer.update import RowState, Rule, step_tensor, update_rows

WIDE_BYTES = 64 << 20


def update_blocks(state: RowState, merged: MergedGrad, rule: Rule, touched: Tensor | None) -> None:
    """touched: which rows move; None: all."""
    steps, (n_rows, n_cols) = step_tensor(state, rule), state.weight.shape
    size = max(1, WIDE_BYTES // (4 * max(1, n_cols)))
    for start in range(0, n_rows, size):
        rows = torch.arange(start, min(start + size, n_rows), device=state.weight.device)
        block = state.part(slice(start, start + size))
        g = _gradient_block(block.weight, merged, slice(start, start + size))
        g = g if rule.grad_scale is None else g * rule.grad_scale
        if touched is None:
            update_rows(block, g, rows, rule, steps)
            continue
        before = [t.clone() for t in block.tensors()]
        update_rows(block, g, rows, rule, steps)
        for now, old in zip(block.tensors(), before, strict=True):
            now.copy_(torch.where(touched[rows].unsqueeze(1), now, old))


def _gradient_block(weight: Tensor, merged: MergedGrad, rows: slice) -> Tensor:
    """The gradient of these rows of the whole weight, fp32 like `weight`, a view of them."""
    pairs, values, table = merged
    parts = []
    if pairs is not None:
        offsets = pairs.groups.offsets[rows.start : rows.stop + 1]
        parts.append(segment_sum(pairs.groups._replace(offsets=offsets), pairs.coef, pairs.operand))
    if values is not None and table is None:
        parts.append(values[rows])
    elif values is not None and table is not None and len(values):
        place = table[rows]
        here = (place >= 0).unsqueeze(1)
        parts.append(torch.where(here, values[place.clamp_min(0)], 0))
    return (
        sum(parts, start=torch.zeros_like(weight, dtype=torch.float32))
        if len(parts) != 1
        else parts[0]
    )
