"""From the gradients of the parts of a batch to one: the mean over `dp`, the cheaper way.

A dictionary's gradient is pairs (row, latent) with a coefficient, and the rows they refer to.
Either those travel, and every process makes the same update; or each sums its own to a dense
gradient of its shard, gets the mean of the rows it owns, updates them with moments that only it
has, and sends the new rows round (ZeRO-1: Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastsae.distributed.mesh import Extent, Mesh
from fastsae.distributed.shards import range_of
from fastsae_kernels import DenseGrad, LatentGroups, PairGrad, RowGrad, SubsetGrad

Exchange = Literal["pairs", "rows"]
"""What travels between the parts: `pairs` and what they refer to, or dense gradients by `rows`."""

BYTES_A_PAIR = 16
"""Row and latent, and a coefficient for each of the two weights."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, so that the parts' gradients become one."""

    pairs: int
    rows: int

    @property
    def cheaper(self) -> Exchange:
        return "pairs" if self.pairs <= self.rows else "rows"


def traffic(
    mesh: Extent, *, rows: int, d_in: int, d_out: int, d_sae: int, n_pairs: int, itemsize: int
) -> Traffic:
    """By both ways, with ring algorithms.

        pairs = (dp - 1) (B' (D + D_out) s + 16 P)
        rows  = 2 (dp - 1) ceil(F / tp / dp) (D + D_out) 4

    With s the bytes of an element of the rows that are multiplied.

    Args:
        rows: B', of a part.
        n_pairs: P, active on one shard of a part.
        itemsize: s.
    """
    owned = len(range_of(len(range_of(d_sae, mesh.tp, 0)), mesh.dp, 0))
    operands = rows * itemsize * (d_in + d_out)
    return Traffic(
        pairs=(mesh.dp - 1) * (operands + n_pairs * BYTES_A_PAIR),
        rows=2 * (mesh.dp - 1) * owned * (d_in + d_out) * max(4, itemsize),
    )


class Parts:
    """The parts of a batch, as an optimizer of the dictionary sees them.

    Args:
        whole: parameters without a latent axis, which every shard has.
    """

    def __init__(self, mesh: Mesh, exchange: Exchange, whole: Iterable[Tensor] = ()) -> None:
        self.mesh, self.exchange, self._whole = mesh, exchange, set(whole)

    @property
    def splits_rows(self) -> bool:
        """Whether a process has the moments of some rows of its shard only."""
        return self.exchange == "rows" and self.mesh.dp > 1

    def owned(self, n_rows: int) -> slice:
        """Rows of a weight that this process updates."""
        if not self.splits_rows:
            return slice(0, n_rows)
        found = range_of(n_rows, self.mesh.dp, self.mesh.part)
        return slice(found.start, found.stop)

    def mean(self, t: Tensor) -> Tensor:
        return self.mesh.mean(t, "dp")

    def norm(self, norms: Mapping[Tensor, Tensor], rows: Collection[Tensor]) -> Tensor:
        """Of the whole gradient, from the norms of what this process has of each parameter's.

        Args:
            rows: those of which it has the rows owned here.
        """
        if self.mesh.size == 1:
            return torch.linalg.vector_norm(torch.stack([*norms.values()]))
        owned, shard, whole = (torch.zeros((), device=self.mesh.device) for _ in range(3))
        for p, norm in norms.items():
            square = norm.square()
            if p in self._whole:
                whole = whole + square
            elif p in rows and self.splits_rows:
                owned = owned + square
            else:
                shard = shard + square
        shard = shard + self.mesh.sum(owned, "dp") if self.splits_rows else shard
        return (self.mesh.sum(shard, "tp") + whole).sqrt()

    def combined(self, lists: Sequence[list[RowGrad]], shapes: Sequence[torch.Size]) -> None:
        """Replace each weight's gradients by the mean over parts, of the rows owned here.

        Args:
            shapes: [F', D] of each weight.
        """
        gathered: dict[int, _Everyone] = {}
        for grads, shape in zip(lists, shapes, strict=True):
            if self.splits_rows:
                grads[:] = [self._scattered(grads, shape)] if grads else []
            else:
                grads[:] = [self._gathered(grad, gathered) for grad in grads]

    def spread(self, rows: Tensor) -> None:
        """Give every process the rows [F', D] that the others own, in place."""
        if not self.splits_rows:
            return
        mine = rows[self.owned(len(rows))]
        block = rows.new_zeros(len(range_of(len(rows), self.mesh.dp, 0)), rows.shape[1])
        block[: len(mine)] = mine
        rows.copy_(self.mesh.gather(block, "dp").flatten(0, 1)[: len(rows)])

    def _scattered(self, grads: Sequence[RowGrad], shape: torch.Size) -> DenseGrad:
        n_rows, width = shape
        block = len(range_of(n_rows, self.mesh.dp, 0))
        like = _values_of(grads[0])
        dense = like.new_zeros(self.mesh.dp * block, width)
        for grad in grads:
            if isinstance(grad, PairGrad):
                dense[:n_rows] += grad.summed()
            elif isinstance(grad, SubsetGrad):
                dense.index_add_(0, grad.latents, grad.values)
            else:
                dense[:n_rows] += grad.values
        owned = self.owned(n_rows)
        mean = self.mesh.scatter_sum(dense, "dp") / self.mesh.dp
        return DenseGrad(mean[: owned.stop - owned.start])

    def _gathered(self, grad: RowGrad, found: dict[int, "_Everyone"]) -> RowGrad:
        if isinstance(grad, SubsetGrad):  # the same dead latents on every part
            return SubsetGrad(grad.latents, self.mean(grad.values))
        if isinstance(grad, DenseGrad):
            return DenseGrad(self.mean(grad.values))
        n_rows = len(grad.operand)
        key = grad.groups.offsets.data_ptr()  # which every process has, whatever its pairs
        if key not in found:  # both weights' gradients are of the same pairs
            found[key] = _Everyone(self.mesh, grad.groups, n_rows)
        everyone = found[key]
        coef = everyone.in_order(grad.coef) / self.mesh.dp
        return PairGrad(everyone.groups, coef, self.mesh.gather(grad.operand, "dp").flatten(0, 1))


class _Everyone:
    """The active pairs of all parts by latent, rows counted over the whole batch."""

    def __init__(self, mesh: Mesh, groups: LatentGroups, n_rows: int) -> None:
        self.mesh = mesh
        counts = groups.counts()
        self.n_pairs = int(groups.offsets[-1])
        latents = torch.arange(len(counts), device=counts.device, dtype=torch.int32)
        latents = latents.repeat_interleave(counts, output_size=self.n_pairs)
        rows = groups.rows[: self.n_pairs] + mesh.part * n_rows
        both = torch.cat(mesh.gather_ragged(torch.stack([latents, rows], 1), "dp"))
        # Stable: within a latent rows ascend, as if one process had had the whole batch.
        self.order = both[:, 0].sort(stable=True).indices
        offsets = torch.cat([counts.new_zeros(1), mesh.sum(counts, "dp").cumsum(0).int()])
        pairs = torch.arange(len(self.order), device=counts.device, dtype=torch.int32)
        self.groups = LatentGroups(pairs, both[self.order, 1], offsets)

    def in_order(self, coef: Tensor) -> Tensor:
        return torch.cat(self.mesh.gather_ragged(coef[: self.n_pairs], "dp"))[self.order]


def _values_of(grad: RowGrad) -> Tensor:
    return grad.coef if isinstance(grad, PairGrad) else grad.values
