"""Rows from a language model, batch by batch: several hooks in one pass, some tokens left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.data.hooks import HookPoint, capture_all
from fastsae.data.language_model import LanguageModel
from fastsae.data.tokens import Context, Place

_log = logging.getLogger(__name__)

CALIBRATION_ROWS = 8192
"""Rows that decide the median norm; more change it by less than a percent."""

NonFinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class RowRules:
    """Which rows are kept."""

    skip_first: int = 1
    """Positions at the start of each context that are left out."""
    dropped_tokens: tuple[int, ...] = ()
    """Rows of these tokens are left out: bos, padding, separators."""
    massive_multiple: float | None = 10.0
    """Rows with a norm above this multiple of the median, at any hook, are left out; None: kept."""
    nonfinite: NonFinite = "stop"
    """What NaN or inf in a row means: an error, or a row left out."""


class BadRow(ValueError):
    """A row that cannot be kept: where it is, counted from the first batch of the pass."""

    def __init__(self, message: str, context: int, position: int, row: int) -> None:
        super().__init__(f"{message} in context {context} at position {position}")
        self.message, self.context, self.position, self.row = message, context, position, row

    def __reduce__(self) -> tuple[Any, ...]:  # another process may hear of it
        return type(self), (self.message, self.context, self.position, self.row)


class TokenBatch(NamedTuple):
    tokens: Int[Tensor, "n L"]
    end: Place


class KeptRows(NamedTuple):
    """Of one pass of the model."""

    rows: tuple[Float[Tensor, "m _"], ...]
    """One tensor a hook; row i is the same token in each."""
    others: tuple[Float[Tensor, "r _"], ...]
    """The rows that are left out, likewise, but for those with NaN or inf."""
    context: Int[Tensor, " m"]
    """Within the batch."""
    position: Int[Tensor, " m"]
    tokens: Int[Tensor, "n L"]
    left_out: dict[str, int]
    end: Place


class _Landing(NamedTuple):
    """What a pass found, on its way to the host."""

    rows: list[Tensor]
    norms: Float[Tensor, "hooks n L"]
    largest: Float[Tensor, "hooks n L"]
    batch: TokenBatch
    landed: Callable[[], object]

    def at(self, hook: int) -> _Landing:
        """The same of one hook."""
        only = slice(hook, hook + 1)
        return self._replace(
            rows=self.rows[only], norms=self.norms[only], largest=self.largest[only]
        )


def row_norms(x: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
    """Euclidean norm of each row, accumulated in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def default_batch_contexts(device: torch.device, length: int) -> int:
    """Contexts per forward pass: enough rows for fast products, few enough to stay in cache."""
    return max(1, (2048 if device.type == "cpu" else 65536) // length)


def token_batches(contexts: Iterable[Context], n: int) -> Iterator[TokenBatch]:
    """The contexts, n at a time."""
    contexts = iter(contexts)
    while taken := list(islice(contexts, n)):
        tokens = torch.from_numpy(np.stack([context.tokens for context in taken]))
        yield TokenBatch(tokens, taken[-1].end)


class ModelRows:
    """Passes of a model, as far as the last of some hooks, and the rows of them that are kept.

    The median norms come from the first contexts of the first pass and are then fixed, so that a
    row's fate depends neither on the batches nor on what follows. On a GPU the rows of one batch
    land on the host while the next batch is under way.

    Args:
        dtype: of the rows; None: the model's own.
        device: where the rows land.
        median_norms: of each hook, to go on with; None: found in the first pass.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Sequence[HookPoint],
        rules: RowRules,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        median_norms: Sequence[float] | None = None,
    ) -> None:
        if rules.massive_multiple is not None and not rules.massive_multiple > 1:
            raise ValueError(
                f"massive_multiple must be more than 1 or None, got {rules.massive_multiple}"
            )
        if rules.skip_first < 0:
            raise ValueError(f"skip_first must be at least 0, got {rules.skip_first}")
        self.lm, self.hooks, self.rules = lm, list(hooks), rules
        self.dtype, self.device = dtype or lm.model.dtype, device
        self.median_norms = None if median_norms is None else list(median_norms)
        self._dropped = torch.tensor(sorted(rules.dropped_tokens), dtype=torch.long)

    @property
    def norm_limits(self) -> list[float]:
        """Rows with a larger norm are left out."""
        multiple = self.rules.massive_multiple
        return [math.inf if multiple is None else multiple * m for m in self.median_norms or []]

    def __call__(self, batches: Iterable[TokenBatch]) -> Iterator[KeptRows]:
        """Run the model over the batches of tokens.

        Raises:
            BadRow: NaN or inf under `stop`, or a number that the dtype does not hold.
            ValueError: tokens outside the vocabulary, or more positions than the model has.
        """
        contexts = rows = 0
        for landing in self._calibrated(self._landings(batches)):
            kept = self._kept(landing, self.hooks, self.norm_limits, contexts, rows)
            contexts, rows = contexts + len(kept.tokens), rows + len(kept.context)
            yield kept

    def each(
        self, batches: Iterable[TokenBatch], first_context: int = 0
    ) -> Iterator[list[KeptRows]]:
        """The same passes; what is kept at a hook does not depend on the other hooks."""
        contexts, rows = first_context, [0] * len(self.hooks)
        for landing in self._calibrated(self._landings(batches)):
            limits = self.norm_limits
            found = [
                self._kept(landing.at(i), [hook], [limits[i]], contexts, rows[i])
                for i, hook in enumerate(self.hooks)
            ]
            contexts += len(landing.batch.tokens)
            rows = [before + len(kept.context) for before, kept in zip(rows, found, strict=True)]
            yield found

    def _landings(self, batches: Iterable[TokenBatch]) -> Iterator[_Landing]:
        """Each batch, landed, once the next one was started."""
        under_way: _Landing | None = None
        for batch in batches:
            started = self._start(batch)
            if under_way is not None:
                under_way.landed()
                yield under_way
            under_way = started
        if under_way is not None:
            under_way.landed()
            yield under_way

    @torch.no_grad()
    def _start(self, batch: TokenBatch) -> _Landing:
        check_tokens(self.lm, batch.tokens)
        found = capture_all(self.lm, self.hooks, batch.tokens)
        norms = torch.stack([row_norms(x) for x in found])
        largest = torch.stack([torch.linalg.vector_norm(x, torch.inf, -1).float() for x in found])
        to_host = lambda x: x.to("cpu", non_blocking=x.is_cuda)
        rows = [x.to(self.dtype).to(self.device, non_blocking=x.is_cuda) for x in found]
        landing = _Landing(rows, to_host(norms), to_host(largest), batch, lambda: None)
        if norms.is_cuda:
            event = torch.cuda.Event()
            event.record()
            landing = landing._replace(landed=event.synchronize)
        return landing

    def _calibrated(self, landings: Iterator[_Landing]) -> Iterator[_Landing]:
        """The same; the first ones are held until they have decided the median norms."""
        held: list[_Landing] = []
        for landing in landings:
            if self.median_norms is None:
                held.append(landing)
                length = landing.batch.tokens.shape[1] - self.rules.skip_first
                if sum(len(one.batch.tokens) for one in held) * length >= CALIBRATION_ROWS:
                    self._calibrate(held)
                    yield from held
                    held.clear()
            else:
                yield landing
        if held:
            self._calibrate(held)
            yield from held

    def _calibrate(self, held: list[_Landing]) -> None:
        norms = torch.cat([one.norms[:, :, self.rules.skip_first :] for one in held], dim=1)
        n_contexts = max(1, math.ceil(CALIBRATION_ROWS / max(1, norms.shape[2])))
        norms = norms[:, :n_contexts].flatten(1)
        medians = [row[row.isfinite()].median().item() if len(row) else 0.0 for row in norms]
        self.median_norms = medians

    def _kept(
        self,
        landing: _Landing,
        hooks: list[HookPoint],
        norm_limits: list[float],
        contexts: int,
        rows: int,
    ) -> KeptRows:
        tokens = landing.batch.tokens
        wanted = ~torch.isin(tokens, self._dropped)
        wanted[:, : self.rules.skip_first] = False
        finite = landing.norms.isfinite()
        limits = torch.tensor(norm_limits, dtype=landing.norms.dtype)[:, None, None]
        light = (landing.norms <= limits) | ~finite
        keep = wanted & light.all(0) & finite.all(0)
        bad = ~finite.all(0)
        if bad.any():
            self._refuse_or_skip(hooks, finite, bad, keep, contexts, rows)
        held = torch.finfo(self.dtype).max
        if bool((landing.largest.amax(0)[keep] > held).any()):
            over = (landing.largest > held) & keep
            hook, context, position = over.nonzero()[0].tolist()
            raise BadRow(
                f"dtype must hold the activations at {hooks[hook].name}, got {self.dtype}, "
                f"which ends at {held:.6g}, and {landing.largest[hook, context, position]:.6g}; "
                "use bfloat16 or float32:",
                *self._place(context, position, keep, contexts, rows),
            )
        context, position = keep.nonzero(as_tuple=True)
        left_out = {
            "first_or_special": int((~wanted).sum()),
            "massive": int((wanted & finite.all(0) & ~light.all(0)).sum()),
            "nonfinite": int((wanted & bad).sum()),
        }
        kept, others = (self._rows_where(chosen, landing.rows) for chosen in (keep, ~keep & ~bad))
        return KeptRows(kept, others, context, position, tokens, left_out, landing.batch.end)

    @staticmethod
    def _rows_where(chosen: Bool[Tensor, "n L"], rows: list[Tensor]) -> tuple[Tensor, ...]:
        flat = chosen.flatten().nonzero().squeeze(1)
        return tuple(x.flatten(0, 1).index_select(0, flat.to(x.device)) for x in rows)

    def _refuse_or_skip(
        self,
        hooks: list[HookPoint],
        finite: Bool[Tensor, "hooks n L"],
        bad: Bool[Tensor, "n L"],
        keep: Bool[Tensor, "n L"],
        contexts: int,
        rows: int,
    ) -> None:
        context, position = bad.nonzero()[0].tolist()
        hook = int((~finite[:, context, position]).nonzero()[0])
        error = BadRow(
            f"activations at {hooks[hook].name} must be finite, got NaN or inf",
            *self._place(context, position, keep, contexts, rows),
        )
        if self.rules.nonfinite == "stop":
            raise error
        _log.warning("%d rows are skipped, the first: %s", int(bad.sum()), error)

    @staticmethod
    def _place(
        context: int, position: int, keep: Tensor, contexts: int, rows: int
    ) -> tuple[int, int, int]:
        before = int(keep[:context].sum()) + int(keep[context, :position].sum())
        return contexts + context, position, rows + before


def check_tokens(lm: LanguageModel, tokens: Int[Tensor, "n L"]) -> None:
    """Raise ValueError for contexts longer than the model's, and for tokens it does not know."""
    if tokens.shape[1] > lm.context_size:
        raise ValueError(
            f"tokens must have at most {lm.context_size} positions for {lm.name}, "
            f"got {tokens.shape[1]}; tokenize with a smaller context_size"
        )
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= lm.vocabulary_size:
        raise ValueError(
            f"tokens must be from 0 to {lm.vocabulary_size - 1}, the vocabulary of {lm.name}, "
            f"got {low} to {high}; tokenize with the model's own tokenizer"
        )
