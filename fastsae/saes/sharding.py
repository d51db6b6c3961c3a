"""What a variant asks of the holders of the latents and of the rows that it does not hold."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from fastsae_kernels import Shards


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
