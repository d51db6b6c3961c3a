"""Batches from a language model that runs beside the training, mixed in a buffer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import count, islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.data.hooks import HookPoint, d_at
from fastsae.data.language_model import LanguageModel
from fastsae.data.model_rows import ModelRows, RowRules, default_batch_contexts, token_batches
from fastsae.data.prefetch import Prefetched
from fastsae.data.text import Text
from fastsae.data.tokens import token_contexts

PASSES_AHEAD = 2
"""Of the model, made while the SAE trains on earlier rows."""


class StreamedRows:
    """Endless batches of several hooks' rows, of which only `buffer_rows` are in memory.

    The buffer is filled once. Then, round by round, batches are drawn from it at places in a seeded
    order, all but a fraction `mixing` of them, and new rows are written into the places of each
    batch when it was drawn: nothing is moved or copied but the rows that come and go, and the model
    has as much to do for every batch. The text is read again when it
    ends. What a batch holds is a function of the model, the text and the seed; to go on from a
    step, the rounds before it are made again, which runs the model over their text. While batches
    are drawn the model is not to be run elsewhere: close the iterator first.

    Args:
        hooks: all from one pass of the model; row i of a batch is the same token at each.
        text: to train on.
        rules: which rows are kept.
        median_norms: of each hook, by name, which the rules refer to.
        buffer_rows: in memory for each hook, at least 2 batches.
        mixing: fraction of the buffer that stays from round to round, in [0, 1).
        ahead: passes of the model that are made ahead, on another thread; it changes no batch.
        part, parts: run over every parts-th context only, from the part-th on: several processes
            share the text.

    Raises:
        ValueError: a number breaks the rule it names.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Sequence[HookPoint],
        text: Text,
        batch_size: int,
        seed: int = 0,
        *,
        context_size: int,
        rules: RowRules,
        median_norms: Mapping[str, float],
        buffer_rows: int,
        mixing: float = 0.5,
        ahead: int = PASSES_AHEAD,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if not 0 <= mixing < 1:
            raise ValueError(f"mixing must be in [0, 1), got {mixing}")
        self.batches_a_round = int(buffer_rows * (1 - mixing)) // max(1, batch_size)
        if batch_size < 1 or self.batches_a_round < 1:
            raise ValueError(
                "buffer_rows must hold a batch in the part that mixing lets go, got "
                f"buffer_rows {buffer_rows}, mixing {mixing} and batch_size {batch_size}"
            )
        self.lm, self.hooks, self.text = lm, list(hooks), text
        self.batch_size, self.seed, self.ahead = batch_size, seed, ahead
        self.context_size, self.buffer_rows = context_size, buffer_rows
        self.part, self.parts = part, parts
        # Now, by a pass of one token: later another thread may be running the model.
        self._widths = {hook.name: d_at(lm, hook) for hook in self.hooks}
        medians = [median_norms[hook.name] for hook in self.hooks]
        self._passes = ModelRows(lm, self.hooks, rules, median_norms=medians)

    def from_step(self, step: int) -> Generator[dict[str, Float[Tensor, "B D"]]]:
        """The batches by hook, from that of a step, counted from 0, on."""
        with Prefetched(self._kept(), self.ahead) as kept:
            buffer = _Buffer(self._widths, self.lm.model.dtype, self.buffer_rows, kept)
            buffer.write(torch.arange(self.buffer_rows))
            for number in count():
                order = torch.randperm(self.buffer_rows, generator=self._generator(number))
                drawn = order[: self.batches_a_round * self.batch_size]
                first = number * self.batches_a_round
                for i, places in enumerate(drawn.split(self.batch_size), first):
                    if i >= step:
                        yield {name: rows[places] for name, rows in buffer.rows.items()}
                    buffer.write(places)

    def _kept(self) -> Iterator[tuple[Tensor, ...]]:
        """Rows of every hook, pass by pass, without end."""
        n_contexts = default_batch_contexts(self.lm.device, self.context_size)
        while True:
            contexts = token_contexts(self.text, self.lm.tokenizer, context_size=self.context_size)
            contexts = islice(contexts, self.part, None, self.parts)
            empty = True
            for part in self._passes(token_batches(contexts, n_contexts)):
                empty = empty and not len(part.context)
                yield part.rows
            if empty:
                raise ValueError(f"text must leave rows to keep, got none of {self.text.name}")

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


class _Buffer:
    """Rows in memory, and the ones that come in."""

    def __init__(
        self,
        widths: Mapping[str, int],
        dtype: torch.dtype,
        n_rows: int,
        incoming: Iterator[tuple[Tensor, ...]],
    ) -> None:
        self.rows = {name: torch.empty(n_rows, d, dtype=dtype) for name, d in widths.items()}
        self._incoming = incoming
        self._waiting = tuple(torch.empty(0, d, dtype=dtype) for d in widths.values())

    def write(self, places: Int[Tensor, " n"]) -> None:
        """The next rows into these places, in their order."""
        while len(places):
            if not len(self._waiting[0]):
                self._waiting = next(self._incoming)
            n = min(len(places), len(self._waiting[0]))
            for rows, new in zip(self.rows.values(), self._waiting, strict=True):
                rows.index_copy_(0, places[:n], new[:n])
            self._waiting = tuple(new[n:] for new in self._waiting)
            places = places[n:]
