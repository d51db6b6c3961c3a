"""Batches from rows in memory, in an order that is a function of the seed and the step alone."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ROWS = 2048
"""Rows that go through an SAE at once where nothing is trained."""


class ShuffledRows:
    """Endless batches: each epoch visits every row once, in its own seeded order.

    The last batch of an epoch is filled from the next one's beginning, so that every batch has
    `batch_size` rows.
    """

    def __init__(self, rows: Float[Tensor, "N D"], batch_size: int, seed: int = 0) -> None:
        if not 1 <= batch_size <= len(rows):
            raise ValueError(
                f"batch_size must be in [1, N] with N = {len(rows)} rows, got {batch_size}"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Float[Tensor, "B D"]:
        """The batch of a step, from 0."""
        first, left, parts = step * self.batch_size, self.batch_size, []
        while left:
            epoch, offset = divmod(first, len(self.rows))
            part = self._epoch(epoch)[offset : offset + left]
            parts.append(part)
            first, left = first + len(part), left - len(part)
        return self.rows[torch.cat(parts)]

    def from_step(self, step: int) -> Iterator[Float[Tensor, "B D"]]:
        while True:
            yield self.batch(step)
            step += 1

    def _epoch(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return self._order[1]
