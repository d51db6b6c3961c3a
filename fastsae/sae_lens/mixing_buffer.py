"""Rows in a random order from a buffer that is refilled in place."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


class MixingBuffer:
    """Endless batches, each drawn at random and without replacement from what the buffer holds.

    The buffer is filled to its capacity again as soon as a batch would leave less than the
    fraction `mixing_fraction` of it; rows that are drawn are replaced by the last ones, so that
    nothing but the batch is ever copied. With a fraction of 0 rows come in their own order.
    The order is a function of the seed and the source alone.
    """

    def __init__(
        self,
        source: Iterator[Float[Tensor, "N D"]],
        *,
        capacity: int,
        batch_size: int,
        mixing_fraction: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not 0 <= mixing_fraction < 1:
            raise ValueError(
                f"activations_mixing_fraction must be in [0, 1), got {mixing_fraction}"
            )
        self.source, self.batch_size = source, batch_size
        self.kept = int(mixing_fraction * capacity)
        self.capacity = max(capacity, self.kept + batch_size)
        self.in_order = mixing_fraction == 0
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: Tensor | None = None
        self.held = 0
        self.waiting: Tensor | None = None

    def __iter__(self) -> "MixingBuffer":
        return self

    def __next__(self) -> Float[Tensor, "B D"]:
        if self.in_order:
            return self._first()
        if self.held - self.batch_size < self.kept:
            self._fill()
        assert self.rows is not None
        drawn = torch.randperm(self.held, generator=self.generator)[: self.batch_size]
        left = self.held - self.batch_size
        batch = self.rows[drawn.to(self.rows.device)]
        stays = torch.ones(self.batch_size, dtype=torch.bool)
        stays[drawn[drawn >= left] - left] = False
        moved = stays.nonzero().squeeze(1) + left
        self.rows[drawn[drawn < left].to(self.rows.device)] = self.rows[moved.to(self.rows.device)]
        self.held = left
        return batch

    def _fill(self) -> None:
        while self.held < self.capacity:
            part = self._next_part()
            if self.rows is None:
                self.rows = part.new_empty(self.capacity, part.shape[1])
            taken = min(len(part), self.capacity - self.held)
            self.rows[self.held : self.held + taken] = part[:taken]
            self.held += taken
            self.waiting = part[taken:] if taken < len(part) else None

    def _next_part(self) -> Tensor:
        return next(self.source) if self.waiting is None else self.waiting

    def _first(self) -> Tensor:
        parts, missing = list[Tensor](), self.batch_size
        while missing:
            part = self._next_part()
            parts.append(part[:missing])
            self.waiting = part[missing:] if missing < len(part) else None
            missing -= len(parts[-1])
        return torch.cat(parts)
