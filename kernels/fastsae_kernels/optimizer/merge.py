"""The gradients of one weight as at most one segment sum and one table of rows.

Micro-batches and loss terms each leave a gradient of their own; a kernel that updates a row once
needs their sum in one place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._row_grads import DenseGrad, PairGrad, RowGrad, SubsetGrad
from fastsae_kernels.code import LatentGroups


class MergedGrad(NamedTuple):
    """grad[j] = sum over the pairs of j + values[table[j]], if table[j] >= 0."""

    pairs: PairGrad | None
    values: Tensor | None
    """[n, D]."""
    table: Tensor | None
    """[F] int32: the row of `values`, or -1; None if `values` are [F, D], row by row."""


def merge(grads: Sequence[RowGrad], n_rows: int) -> MergedGrad:
    """One gradient that is the sum of `grads`; no count reaches the host.

    Several `PairGrad`s: their operands are copied into one, [sum of B, D], unless they are one.
    Several of the others: their values are, [sum of n, D] or [F, D].
    """
    pairs = [grad for grad in grads if isinstance(grad, PairGrad)]
    dense = [grad for grad in grads if isinstance(grad, DenseGrad)]
    subsets = [grad for grad in grads if isinstance(grad, SubsetGrad)]
    merged = _merge_pairs(pairs) if pairs else None
    if dense:
        return MergedGrad(merged, _merge_dense(dense, subsets), None)
    return MergedGrad(merged, *_merge_subsets(subsets, n_rows))


def touched_rows(grads: Sequence[RowGrad], n_rows: int) -> Tensor:
    """[F] bool: the rows that at least one of `grads` speaks of."""
    known = []
    for grad in grads:
        if isinstance(grad, DenseGrad):
            return grad.values.new_ones(n_rows, dtype=torch.bool)
        known.append(_touched(grad, n_rows))
    return torch.stack(known).any(0)


def _touched(grad: PairGrad | SubsetGrad, n_rows: int) -> Tensor:
    if isinstance(grad, PairGrad):
        return grad.groups.counts() > 0
    mask = torch.zeros(n_rows, dtype=torch.bool, device=grad.latents.device)
    return mask.index_fill_(0, grad.latents, True)


def _merge_pairs(grads: list[PairGrad]) -> PairGrad:
    if len(grads) == 1:
        return grads[0]
    operands = list({id(grad.operand): grad.operand for grad in grads}.values())
    starts, n_rows = {}, 0
    for operand in operands:
        starts[id(operand)] = n_rows
        n_rows += len(operand)
    # Stable: within a latent the micro-batches stay in order, as in one batch made of all of them.
    order = torch.cat([_latents(grad.groups) for grad in grads]).sort(stable=True).indices
    rows = torch.cat([grad.groups.rows + starts[id(grad.operand)] for grad in grads])
    coef = torch.cat([grad.coef for grad in grads])
    offsets = torch.stack([grad.groups.offsets for grad in grads]).sum(0, dtype=torch.int32)
    operand = operands[0] if len(operands) == 1 else torch.cat(operands)
    return PairGrad(LatentGroups(order.int(), rows[order], offsets), coef[order], operand)


def _latents(groups: LatentGroups) -> Tensor:
    """[P] int32: the latent of each pair, F for those that are not active."""
    places = torch.arange(len(groups.rows), device=groups.rows.device, dtype=torch.int32)
    return torch.searchsorted(groups.offsets[1:], places, right=True, out_int32=True)


def _merge_dense(dense: list[DenseGrad], subsets: list[SubsetGrad]) -> Tensor:
    if len(dense) == 1 and not subsets:
        return dense[0].values.contiguous()
    total = dense[0].values.clone(memory_format=torch.contiguous_format)
    for grad in dense[1:]:
        total += grad.values
    for grad in subsets:
        total.index_copy_(0, grad.latents, total[grad.latents] + grad.values)
    return total


def _merge_subsets(grads: list[SubsetGrad], n_rows: int) -> tuple[Tensor | None, Tensor | None]:
    if not grads:
        return None, None
    present = torch.stack([_touched(grad, n_rows) for grad in grads]).any(0)
    place = present.cumsum(0, dtype=torch.int32) - 1
    if len(grads) == 1:  # its latents ascend: place counts them in the order of its values
        values = grads[0].values.contiguous()
    else:
        values = torch.cat([torch.zeros_like(grad.values) for grad in grads])
        for grad in grads:
            at = place[grad.latents].long()
            values.index_copy_(0, at, values[at] + grad.values)
    return values, torch.where(present, place, -1)
