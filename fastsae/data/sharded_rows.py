"""Batches from shards on disk, in an order that is a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data.prefetch import Prefetched
from fastsae.data.shards import ActivationShards

WINDOW_ROWS = 131_072
"""Rows that are shuffled together by default."""
WINDOWS_AHEAD = 1


class _Window(NamedTuple):
    rows: Float[Tensor, "n D"]
    """In the order of the files."""
    order: Tensor
    """[n] int64: the order they are handed out in."""


class ShardedRows:
    """Endless batches of one hook's rows, each row once an epoch, shuffled on two levels.

    Every epoch takes the shards in an order of its own, so many together that they hold
    `window_rows` rows, and shuffles those among each other. The last batch of a window is filled
    from the next one's beginning, so that every batch has `batch_size` rows. Batches are in the
    dtype of the files, in pinned memory where there is a GPU.

    Args:
        shards: what `fastsae harvest` wrote.
        hook: one of its hooks.
        window_rows: rows that are shuffled together, at most, in whole shards (at least one).
        ahead: windows that are read before their use, on another thread; it changes no batch.

    Raises:
        ValueError: the hook is not there, or fewer rows than a batch has.
    """

    def __init__(
        self,
        shards: ActivationShards,
        hook: str,
        batch_size: int,
        seed: int = 0,
        *,
        window_rows: int = WINDOW_ROWS,
        ahead: int = WINDOWS_AHEAD,
    ) -> None:
        self.shards, self.hook = shards, shards.check_hook(hook)
        self.sizes = [shard.rows for shard in shards.index.shards]
        if not 1 <= batch_size <= sum(self.sizes):
            raise ValueError(
                f"batch_size must be in [1, N] with N = {sum(self.sizes)} rows, got {batch_size}"
            )
        if window_rows < 1:
            raise ValueError(f"window_rows must be at least 1, got {window_rows}")
        self.batch_size, self.seed, self.window_rows = batch_size, seed, window_rows
        self.ahead = ahead

    @property
    def n_windows(self) -> int:
        """In memory: one that batches come from, those that wait, one that is being read."""
        return 2 + self.ahead

    @property
    def window_bytes(self) -> int:
        """Memory of one window."""
        return self._room * self.shards.index.widths[self.hook] * self.shards.dtype.itemsize

    def sample(self, n_rows: int) -> Float[Tensor, "n D"]:
        """About so many rows, at equal distances over all shards."""
        stride = max(1, sum(self.sizes) // n_rows)
        parts = [self.shards.rows(self.hook, i)[::stride] for i in range(len(self.sizes))]
        return torch.cat(parts)

    def from_step(self, step: int) -> Generator[Float[Tensor, "B D"]]:
        """The batches from that of a step, counted from 0, on."""
        epoch, skipped = divmod(step * self.batch_size, sum(self.sizes))
        batch, filled = self._empty(self.batch_size), 0
        with Prefetched(self._windows(epoch, skipped), self.ahead) as windows:
            for rows, order in windows:
                while len(order):
                    part, order = order[: self.batch_size - filled], order[len(batch) - filled :]
                    torch.index_select(rows, 0, part, out=batch[filled : filled + len(part)])
                    filled += len(part)
                    if filled == self.batch_size:
                        yield batch
                        batch, filled = self._empty(self.batch_size), 0

    def _windows(self, epoch: int, skipped: int) -> Iterator[_Window]:
        """The windows from a row of an epoch on; a window's memory is used again `n_windows` later,
        when whoever takes them has moved on."""
        buffers = cycle([self._empty(self._room, pin=False) for _ in range(self.n_windows)])
        while True:
            for number, shards in enumerate(self._epoch(epoch)):
                n_rows = sum(self.sizes[shard] for shard in shards)
                if skipped >= n_rows:
                    skipped -= n_rows
                    continue
                rows, first = next(buffers)[:n_rows], 0
                for shard in shards:
                    found = self.shards.rows(self.hook, shard)
                    rows[first : first + len(found)].copy_(found)
                    first += len(found)
                order = torch.randperm(n_rows, generator=self._generator(epoch, 1 + number))
                yield _Window(rows, order[skipped:])
                skipped = 0
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        """The shards of each window."""
        together, n_rows = list[int](), 0
        for shard in torch.randperm(len(self.sizes), generator=self._generator(epoch, 0)).tolist():
            if together and n_rows + self.sizes[shard] > self.window_rows:
                yield together
                together, n_rows = [], 0
            together.append(shard)
            n_rows += self.sizes[shard]
        yield together

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        # Each window has an order of its own, whichever came before it.
        key = (self.seed * 1_000_003 + epoch) * 1_000_003 + number
        return torch.Generator().manual_seed(key % 2**63)

    def _empty(self, n_rows: int, *, pin: bool = True) -> Tensor:
        width = self.shards.index.widths[self.hook]
        pinned = pin and torch.cuda.is_available()
        return torch.empty(n_rows, width, dtype=self.shards.dtype, pin_memory=pinned)

    @property
    def _room(self) -> int:
        """Rows of the largest window there can be."""
        return max(min(self.window_rows, sum(self.sizes)), *self.sizes)
