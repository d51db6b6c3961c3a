"""What a variant asks of the holders of the latents and of the rows that it does not hold."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from fastsae_kernels import Shards

BLOCK = 8192
"""Latents that are made at once where every process makes, or is sent, those of all."""


@runtime_checkable
class Sharding(Shards, Protocol):
    """One shard of a dictionary among others, each of which may train on a part of the batch.

    Every method is called by all shards in the same order; those that take a tensor give every
    caller the same numbers.
    """

    @property
    def latents(self) -> range:
        """Those of this shard, counted over the dictionary."""
        ...

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every shard has and uses for its latents: its gradient is the sum."""
        ...

    def mean_of_parts(self, t: Tensor) -> Tensor:
        """Mean over the parts of the batch, which have equally many rows; not differentiable."""
        ...

    def least(self, t: Tensor) -> Tensor:
        """Minimum over all shards and parts; not differentiable."""
        ...


def blocks(d_sae: int, held: range) -> Iterator[tuple[range, slice, slice]]:
    """The latents of a dictionary a block at a time: which they are, the ones among them that are
    held, and where these stand among all that are held."""
    for start in range(0, d_sae, BLOCK):
        latents = range(start, min(start + BLOCK, d_sae))
        first = max(latents.start, held.start)
        last = max(first, min(latents.stop, held.stop))
        yield (
            latents,
            slice(first - latents.start, last - latents.start),
            slice(first - held.start, last - held.start),
        )
