"""Rows of activations from a language model, but for first positions, special and massive ones.

The first position of a context has a norm some 150 times the median whatever its token, and
about one later row in 3,000 is as massive, with most of its length in a single dimension. A
handful of such rows would carry nearly all the variance that an SAE is asked to explain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.data.hooks import HookPoint, d_at
from fastsae.data.language_model import LanguageModel
from fastsae.data.model_rows import (
    BadRow,
    KeptRows,
    ModelRows,
    NonFinite,
    RowRules,
    TokenBatch,
    default_batch_contexts,
    row_norms,
)
from fastsae.data.tokens import BEGINNING

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowFilter:
    """Which rows an SAE is trained on: kept iff position >= skip_first, norm <= norm_limit, and the
    token is not one of `dropped_tokens`."""

    skip_first: int = 1
    norm_limit: float = math.inf
    dropped_tokens: tuple[int, ...] = ()

    def keep(self, x: Float[Tensor, "n L D"], tokens: Int[Tensor, "n L"]) -> Bool[Tensor, "n L"]:
        """True where a row is kept."""
        kept = row_norms(x) <= self.norm_limit
        kept[:, : self.skip_first] = False
        return kept & ~torch.isin(tokens, tokens.new_tensor(self.dropped_tokens))


@dataclass(frozen=True, eq=False)
class Activations:
    """Kept rows, where they came from, and the rows set aside."""

    rows: Float[Tensor, "N D"]
    context_of: Int[Tensor, " N"]
    position_of: Int[Tensor, " N"]
    excluded: Float[Tensor, "M D"]
    """The others in the model's dtype, for metrics on all rows."""
    tokens: Int[Tensor, "n L"]
    n_first: int
    n_special: int
    """Rows of special tokens past the first positions."""
    n_massive: int
    """Of the other rows."""
    median_norm: float
    """Of the rows past `skip_first` in the first contexts."""
    row_filter: RowFilter

    @property
    def norm_limit(self) -> float:
        """Rows with a larger norm are massive."""
        return self.row_filter.norm_limit


def harvest(
    lm: LanguageModel, hook: HookPoint, tokens: Int[Tensor, "n L"], **options: Any
) -> Activations:
    """Run the model over `tokens`, stopped at `hook`, and gather one row per token.

    Args:
        options: as in `harvest_all`, which takes several hooks at once.
    """
    return harvest_all(lm, [hook], tokens, **options)[0]


def harvest_all(
    lm: LanguageModel,
    hooks: Sequence[HookPoint],
    tokens: Int[Tensor, "n L"],
    *,
    batch_contexts: int | None = None,
    skip_first: int = 1,
    drop_special: bool = True,
    massive_multiple: float = 10.0,
    nonfinite: NonFinite = "stop",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    median_norms: Sequence[float] | None = None,
    first_context: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Activations]:
    """The same at several hooks, of one pass that ends at the last of them.

    The median norm comes from the first contexts (8,192 rows) and is then fixed, so that a row's
    fate depends neither on the batches nor on what follows.

    Args:
        batch_contexts: contexts per forward pass; None chooses by device.
        skip_first: positions at the start of each context that are set aside.
        drop_special: set the rows of the tokenizer's special tokens aside, wherever they stand.
        massive_multiple: a row is massive if its norm exceeds this multiple of the median norm.
        nonfinite: what NaN or inf in an activation means: an error, or a row left out.
        dtype: of the rows; None keeps the model's own. Rows are finite: if the largest |x| of
            those kept is above the dtype's largest number (65,504 in float16), all of them are
            kept in float32 instead, and a warning is logged.
        device: of the rows; None keeps the model's own.
        median_norms: of each hook, of an earlier part of the text; None: found in this one.
        first_context: contexts before these, which a message counts too.
        progress: called with the number of tokens done and the number of tokens in all.

    Raises:
        ValueError: tokens of a wrong shape or outside the vocabulary; NaN or inf in an
            activation, under `stop`.
    """
    _check(tokens, batch_contexts, skip_first, massive_multiple)
    n, length = tokens.shape
    step = batch_contexts or default_batch_contexts(lm.device, length)
    special = lm.special_ids if drop_special else ()
    rules = RowRules(skip_first, special, massive_multiple, nonfinite)
    passes = ModelRows(lm, hooks, rules, device=device or lm.device, median_norms=median_norms)
    gathered = [_Gathered(lm, hook, tokens, skip_first, dtype, device) for hook in hooks]
    n_contexts = 0
    try:
        batches = (TokenBatch(some, BEGINNING) for some in tokens.cpu().split(step))
        for parts in passes.each(batches, first_context):
            for one, part in zip(gathered, parts, strict=True):
                one.add(part, n_contexts)
            n_contexts += len(parts[0].tokens)
            if progress is not None:
                progress(n_contexts * length, n * length)
    except BadRow as bad:
        raise ValueError(
            f"{bad}; check the weights, or load the model with a dtype of wider range"
        ) from bad
    assert passes.median_norms is not None
    return [
        one.finish(RowFilter(skip_first, limit, special), median)
        for one, limit, median in zip(
            gathered, passes.norm_limits, passes.median_norms, strict=True
        )
    ]


class _Gathered:
    """Rows written where they stay: one allocation for all that can be kept."""

    def __init__(
        self,
        lm: LanguageModel,
        hook: HookPoint,
        tokens: Tensor,
        skip_first: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        n, length = tokens.shape
        room = n * (length - skip_first)
        self.hook, self.tokens = hook, tokens
        self.rows = torch.empty(
            room, d_at(lm, hook), dtype=dtype or lm.model.dtype, device=device or lm.device
        )
        self.where = torch.empty(2, room, dtype=torch.int32, device=self.rows.device)
        self.excluded: list[Tensor] = []
        self.n = self.n_massive = 0

    def add(self, part: KeptRows, first_context: int) -> None:
        (kept,), (others,) = part.rows, part.others
        end = self.n + len(kept)
        largest = kept.abs().amax().item() if len(kept) else 0.0
        if largest > torch.finfo(self.rows.dtype).max:
            self._widen(torch.promote_types(kept.dtype, torch.float32), largest)
        self.rows[self.n : end].copy_(kept)
        self.where[0, self.n : end].copy_(part.context + first_context)
        self.where[1, self.n : end].copy_(part.position)
        self.excluded.append(others)
        self.n_massive += part.left_out["massive"]
        self.n = end

    def _widen(self, dtype: torch.dtype, largest: float) -> None:
        _log.warning(
            "rows at %s are kept in %s: max|x| of %.3g does not fit %s",
            self.hook.name,
            dtype,
            largest,
            self.rows.dtype,
        )
        rows = torch.empty_like(self.rows, dtype=dtype)
        rows[: self.n].copy_(self.rows[: self.n])
        self.rows = rows

    def finish(self, row_filter: RowFilter, median: float) -> Activations:
        n_first = len(self.tokens) * row_filter.skip_first
        later = self.tokens[:, row_filter.skip_first :]
        n_special = int(torch.isin(later, later.new_tensor(row_filter.dropped_tokens)).sum())
        return Activations(
            rows=self.rows[: self.n],
            context_of=self.where[0, : self.n],
            position_of=self.where[1, : self.n],
            excluded=torch.cat(self.excluded),
            tokens=self.tokens,
            n_first=n_first,
            n_special=n_special,
            n_massive=self.n_massive,
            median_norm=median,
            row_filter=row_filter,
        )


def _check(
    tokens: Tensor,
    batch_contexts: int | None,
    skip_first: int,
    massive_multiple: float,
) -> None:
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must have the shape [n, L], got {list(tokens.shape)}")
    if tokens.is_floating_point():
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if batch_contexts is not None and batch_contexts < 1:
        raise ValueError(f"batch_contexts must be at least 1, got {batch_contexts}")
    if not 0 <= skip_first < tokens.shape[1]:
        raise ValueError(
            f"skip_first must be from 0 to L - 1 = {tokens.shape[1] - 1}, got {skip_first}"
        )
    if not massive_multiple > 1:
        raise ValueError(f"massive_multiple must be more than 1, got {massive_multiple}")
