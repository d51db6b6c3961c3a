"""Batches from shards on disk, of rows that are a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.data.prefetch import Prefetched
from fastsae.data.shards import ActivationShards

WINDOW_ROWS = 131_072
"""Rows that are shuffled together by default."""
BATCHES_AHEAD = 4


class _Window(NamedTuple):
    shards: list[int]
    order: Int[Tensor, " n"]
    """In which its rows are handed out, counted over its shards."""


class ShardedRows:
    """Endless batches of one hook's rows, each row once an epoch, shuffled on two levels.

    Every epoch takes the shards in an order of its own, so many together that they hold
    `window_rows` rows, and draws its batches from all of those. The last batch of a window is
    filled from the next one, so that every batch has `batch_size` rows; within a batch they stand
    in the order of the files. Rows are copied out of the mapped files where they are drawn: only
    batches are in memory. They are in the dtype of the files, and pinned where there is a GPU.

    Args:
        shards: what `fastsae harvest` wrote.
        hook: one of its hooks.
        window_rows: rows that are shuffled together, at most, in whole shards (at least one).
        ahead: batches that are read before their use, on another thread; it changes none of them.
        part, parts: yield the part-th of so many equal parts of each batch only, and read no other.

    Raises:
        ValueError: the hook is not there, fewer rows than a batch has, or parts that are not equal;
            while they are read, a row holds NaN or inf, which the message places.
    """

    def __init__(
        self,
        shards: ActivationShards,
        hook: str,
        batch_size: int,
        seed: int = 0,
        *,
        window_rows: int = WINDOW_ROWS,
        ahead: int = BATCHES_AHEAD,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.shards, self.hook = shards, shards.check_hook(hook)
        self.sizes = [shard.rows for shard in shards.index.shards]
        if not 1 <= batch_size <= sum(self.sizes):
            raise ValueError(
                f"batch_size must be in [1, N] with N = {sum(self.sizes)} rows, got {batch_size}"
            )
        if window_rows < 1:
            raise ValueError(f"window_rows must be at least 1, got {window_rows}")
        self.batch_size, self.seed = batch_size, seed
        self.window_rows, self.ahead = window_rows, ahead
        if not 0 <= part < parts or batch_size % parts:
            raise ValueError(
                f"parts must divide batch_size {batch_size}, got part {part} of {parts}"
            )
        size = batch_size // parts
        self._mine = range(part * size, (part + 1) * size)

    def sample(self, n_rows: int) -> Float[Tensor, "n D"]:
        """About so many rows, at equal distances over all shards."""
        stride = max(1, sum(self.sizes) // n_rows)
        parts = []
        for shard in range(len(self.sizes)):
            parts.append(self.shards.rows(self.hook, shard)[::stride])
            self._check_finite(parts[-1], torch.arange(len(parts[-1])) * stride, [shard])
        return torch.cat(parts)

    def from_step(self, step: int) -> Generator[Float[Tensor, "B D"]]:
        """The batches from that of a step, counted from 0, on."""
        with Prefetched(self._batches(step), self.ahead) as batches:
            yield from batches

    def _batches(self, step: int) -> Iterator[Tensor]:
        epoch, skipped = divmod(step * self.batch_size, sum(self.sizes))
        batch, filled = self._empty(), 0
        for window, following in pairwise(self._windows(epoch, skipped)):
            self.shards.will_read([*window.shards, *following.shards])
            files = [_bits(self.shards.rows(self.hook, shard)) for shard in window.shards]
            for part in _cut(window.order, self.batch_size, self.batch_size - filled):
                # In the order of the files, of which a part of a batch is a run.
                mine = part.sort().values[_overlap(self._mine, filled, len(part))]
                start = max(0, filled - self._mine.start)
                rows = batch[start : start + len(mine)]
                _gather(files, mine, _bits(rows))
                self._check_finite(rows, mine, window.shards)
                filled += len(part)
                if filled == self.batch_size:
                    yield batch
                    batch, filled = self._empty(), 0

    def _windows(self, epoch: int, skipped: int) -> Iterator[_Window]:
        """Without end, from a row of an epoch on."""
        while True:
            for number, shards in enumerate(self._epoch(epoch)):
                n_rows = sum(self.sizes[shard] for shard in shards)
                if skipped < n_rows:
                    order = torch.randperm(n_rows, generator=self._generator(epoch, 1 + number))
                    yield _Window(shards, order[skipped:])
                skipped = max(0, skipped - n_rows)
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

    def _check_finite(self, rows: Tensor, numbers: Tensor, shards: list[int]) -> None:
        """Of rows that were read, by their numbers over some shards: harvests hold no other."""
        if _finite(rows):
            return
        number = int(numbers[int((~rows.isfinite()).any(1).int().argmax())])
        for shard in shards:
            if number < self.sizes[shard]:
                raise ValueError(
                    f"activations at {self.hook} must be finite, got NaN or inf in "
                    f"{self.shards.path(shard)}, row {number}"
                )
            number -= self.sizes[shard]

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        # Each window has an order of its own, whichever came before it.
        key = (self.seed * 1_000_003 + epoch) * 1_000_003 + number
        return torch.Generator().manual_seed(key % 2**63)

    def _empty(self) -> Tensor:
        width, pinned = self.shards.index.widths[self.hook], torch.cuda.is_available()
        return torch.empty(len(self._mine), width, dtype=self.shards.dtype, pin_memory=pinned)


def _overlap(wanted: range, first: int, n: int) -> slice:
    """Which of n things, of which the first has a number, are wanted."""
    return slice(max(0, wanted.start - first), max(0, min(n, wanted.stop - first)))


def _cut(order: Tensor, size: int, first: int) -> Iterator[Tensor]:
    """In parts of `size`, but for the first and the last."""
    yield order[:first]
    yield from order[first:].split(size) if len(order) > first else ()


def _gather(files: list[np.ndarray], rows: Tensor, out: np.ndarray) -> None:
    """Copy rows, counted over the files, that ascend."""
    starts = [0, *accumulate(map(len, files))]
    edges = torch.searchsorted(rows, torch.tensor(starts)).tolist()
    for file, start, first, last in zip(files, starts, edges, edges[1:], strict=False):
        # By numpy, which takes one thread and lets go of the interpreter: torch's threads would
        # fight with those of the training.
        wanted = (rows[first:last] - start).numpy()
        np.take(file, wanted, axis=0, out=out[first:last], mode="clip")


def _finite(rows: Tensor) -> bool:
    """Whether all are. Without their signs the bits of floats are in order, up to inf and NaN;
    they are compared by numpy, on one thread as in `_gather`, several times as fast as they come.
    """
    integers = torch.int16 if rows.element_size() == 2 else torch.int32
    bits = rows.view(integers).numpy()
    infinity = torch.tensor(torch.inf, dtype=rows.dtype).view(integers).item()
    return bool((bits & np.iinfo(bits.dtype).max).max(initial=0) < infinity)


def _bits(rows: Tensor) -> np.ndarray:
    """The same memory; numpy has no bfloat16."""
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
