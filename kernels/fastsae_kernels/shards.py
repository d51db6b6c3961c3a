"""What an op of some of a dictionary's latents asks of those who hold the others.

A dictionary larger than one device is split by latent: a shard is W_enc [D, F'], b_enc [F'] and
W_dec [F', D] of a range of latents. Ops that take `shards` are called with the same rows on every
shard, at the same time, and are then exactly those of the whole dictionary. Nothing here knows how
shards talk to each other.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from fastsae_kernels._dispatch import Impl


@runtime_checkable
class Shards(Protocol):
    """One shard's way to the others. Every call is made by all of them, in the same order."""

    @property
    def widest(self) -> int:
        """Latents of the shard that has most."""
        ...

    def total(self, part: Tensor) -> Tensor:
        """Sum over shards, the same on each; differentiable: each part's gradient is the sum's."""
        ...

    def counts(self, n: int) -> list[int]:
        """A number of each shard."""
        ...

    def keep_topk(self, values: Tensor, k: int, width: int) -> Tensor:
        """Which of `values` [B, w] are among the k largest of their row over all shards.

        Args:
            values: descending, lowest latent first among equals; w <= `width`.
            width: w of the shard that has most.

        Returns:
            [B, w] bool, k True a row over all shards; of values equal to the smallest kept one
            those of the lowest latents are kept.
        """
        ...

    def keep_batch_topk(self, values: Tensor, rows: Tensor, latents: Tensor, n: int) -> Tensor:
        """Which of `values` [nnz] >= 0 are among the n largest positive ones anywhere.

        Of values equal to the smallest kept one those of the lowest (row, latent) are kept.

        Args:
            rows, latents: [nnz] int64, counted on this shard.
        """
        ...

    def batch_rows(self, n: int) -> int:
        """Rows of the whole batch, of which every holder of a part has n."""
        ...


def check_shards(shards: Shards | None, impl: Impl) -> None:
    """Raise ValueError for shards of the reference, whose dense mathematics know none."""
    if shards is not None and impl is Impl.REFERENCE:
        raise ValueError("impl must be 'auto', 'triton' or 'eager' with shards, got 'reference'")


Select = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""acts, indices [B, k] of rows [B, D], by value descending, lowest index first among equals."""


def lowest_first(select: Select, rows: Tensor, k: int, n_latents: int) -> tuple[Tensor, Tensor]:
    """The k largest positive values of each row; where equals are cut, the lowest latents stay.

    A selection may drop any of the values equal to the k-th; a wider one shows whether it had to.
    Rows in which it had are few, and are selected again, wider and wider; the host waits to know.
    """
    if k == n_latents:
        return select(rows, k)
    acts, indices = select(rows, k + 1)
    cut = (acts[:, k - 1] == acts[:, k]) & (acts[:, k] > 0)
    acts, indices = acts[:, :k].contiguous(), indices[:, :k].contiguous()
    width, places = k + 1, cut.nonzero().squeeze(1)
    while len(places):
        width = min(2 * width, n_latents)
        wider_acts, wider_indices = select(rows[places], width)
        acts[places], indices[places] = wider_acts[:, :k], wider_indices[:, :k]
        last = wider_acts[:, -1]
        cut = (wider_acts[:, k - 1] == last) & (last > 0) & (width < n_latents)
        places = places[cut]
    return acts, indices


SelectBatch = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""row_offsets [B + 1], indices [n] and acts [n] of the n largest of a batch."""


def all_that_may_win(select: SelectBatch, n: int, n_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """A selection of a batch that holds every value as large as its n-th largest positive one."""
    width = min(n, n_values)
    while True:
        width = min(width + 1, n_values)
        found = select(width)
        if width == n_values:
            return found
        ascending = found[2].topk(width - n + 1, largest=False).values
        least, nth = ascending[0], ascending[-1]
        if not bool((least == nth) & (least > 0)):
            return found
        width *= 2
