"""Gradients of a dictionary's rows, kept as the pairs that make them until somebody needs them.

The gradient of a weight [F, D] that is only touched at the active pairs is

    grad[j] = sum over pairs p of latent j of coef[p] * operand[row(p)].

Backward hands that over as a `RowGrad`, to be summed by a row optimizer one cache-sized block of
rows at a time, or to be written out as an ordinary dense gradient.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import LatentGroups
from fastsae_kernels.grouping import ops
from fastsae_kernels.grouping.eager import segment_sum


@dataclass(frozen=True)
class PairGrad:
    """grad[j] = sum over the pairs p of latent j of coef[p] * operand[row(p)]."""

    groups: LatentGroups
    coef: Tensor
    """[P], in the order of `groups.pairs`."""
    operand: Tensor
    """[B, D], contiguous."""

    def block(self, start: int, stop: int) -> Tensor:
        """[stop - start, D]: the gradient of these rows, summed in a fixed order."""
        first, last = int(self.groups.offsets[start]), int(self.groups.offsets[stop])
        rows = self.groups.rows[first:last]
        part = LatentGroups(rows, rows, self.groups.offsets[start : stop + 1] - first)
        return segment_sum(part, self.coef[first:last], self.operand)

    def touched(self) -> "PairGrad":
        """The same gradient without the rows that are zero because their latent has no pair."""
        offsets = self.groups.offsets
        starts = offsets[:-1][self.groups.counts() > 0]
        return replace(self, groups=self.groups._replace(offsets=torch.cat([starts, offsets[-1:]])))

    def summed(self, impl: Impl = Impl.AUTO) -> Tensor:
        """[F, D]: the dense gradient."""
        impl = resolve_impl(impl, self.coef.device, dtypes=(self.coef.dtype,))
        return ops.segment_sum(self.groups, self.coef, self.operand, impl)

    def scaled(self, factor: Tensor) -> "PairGrad":
        return replace(self, coef=self.coef * factor)


@dataclass(frozen=True)
class SubsetGrad:
    """grad[latents] = values, zero elsewhere."""

    latents: Tensor
    """[n] int64, ascending."""
    values: Tensor
    """[n, D]."""

    def block(self, start: int, stop: int) -> Tensor:
        out = self.values.new_zeros(stop - start, self.values.shape[1])
        edges = torch.tensor([start, stop], device=self.latents.device)
        first, last = torch.searchsorted(self.latents, edges).tolist()
        out[self.latents[first:last] - start] = self.values[first:last]
        return out

    def scaled(self, factor: Tensor) -> "SubsetGrad":
        return replace(self, values=self.values * factor)


@dataclass(frozen=True)
class DenseGrad:
    """grad = values."""

    values: Tensor
    """[F, D]."""

    def block(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def scaled(self, factor: Tensor) -> "DenseGrad":
        return replace(self, values=self.values * factor)


RowGrad = PairGrad | SubsetGrad | DenseGrad


def collect_row_grads(weight: Tensor) -> list[RowGrad]:
    """From now on backward appends this weight's gradients to the list returned, not to `.grad`."""
    grads: list[RowGrad] = []
    weight.row_grads = grads  # pyright: ignore[reportAttributeAccessIssue]
    return grads


def release_row_grads(weight: Tensor) -> None:
    """Undo `collect_row_grads`."""
    if hasattr(weight, "row_grads"):
        del weight.row_grads  # pyright: ignore[reportAttributeAccessIssue]


def row_grads_of(weight: Tensor) -> list[RowGrad] | None:
    """Where backward leaves this weight's gradient: a row optimizer's list, or None for `.grad`."""
    return getattr(weight, "row_grads", None)


def emit_pairs(
    sink: list[RowGrad] | None, groups: LatentGroups, coef: Tensor, operand: Tensor, impl: Impl
) -> Tensor | None:
    """Hand the pairs to the row optimizer's list if there is one, else sum them to [F, D]."""
    if sink is None:
        return ops.segment_sum(groups, coef, operand, impl)
    sink.append(PairGrad(groups, coef, operand))
    return None


def emit_rows(
    sink: list[RowGrad] | None, latents: Tensor, values: Tensor, n_rows: int
) -> Tensor | None:
    """The same for a gradient [n, D] of some latents' rows [n]."""
    if sink is None:
        return values.new_zeros(n_rows, values.shape[1]).index_copy_(0, latents, values)
    sink.append(SubsetGrad(latents, values))
    return None


def emit_dense(sink: list[RowGrad] | None, values: Tensor) -> Tensor | None:
    """The same for a gradient [F, D] that is dense already."""
    if sink is None:
        return values
    sink.append(DenseGrad(values))
    return None
