"""What a reconstruction costs the language model: cross-entropy with it spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastsae.data.activations import RowFilter
from fastsae.data.hooks import HookPoint, splice
from fastsae.data.language_model import LanguageModel
from fastsae.data.replay import Replay

Rows = Float[Tensor, "N D"]


@dataclass(frozen=True)
class SpliceLoss:
    """Losses in nats per predicted token, the same positions spliced as zero-ablated."""

    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    kl_spliced: float | None = None
    """Mean KL(clean || spliced), if asked for."""
    kl_zero_ablated: float | None = None
    ce_mean_ablated: float | None = None
    """With the mean row in the place of each, if a mean was given."""
    kl_mean_ablated: float | None = None

    @property
    def ce_loss_score(self) -> float:
        """(zero - spliced) / (zero - clean): 1 changes nothing, 0 is as bad as zeros."""
        return _ratio(self.ce_zero_ablated - self.ce_spliced, self.ce_zero_ablated - self.ce_clean)

    @property
    def kl_score(self) -> float | None:
        """(kl_zero_ablated - kl_spliced) / kl_zero_ablated."""
        if self.kl_spliced is None or self.kl_zero_ablated is None:
            return None
        return _ratio(self.kl_zero_ablated - self.kl_spliced, self.kl_zero_ablated)


@dataclass(frozen=True)
class LossRecovered:
    """The rows an SAE is trained on replaced (the headline), and every position replaced."""

    trained_rows: SpliceLoss
    every_position: SpliceLoss | None
    """None if it was not asked for."""
    untouched_fraction: float
    """Of the positions, those that `trained_rows` leaves alone."""
    n_predicted: int
    """Tokens the means are over: L - 1 for each context, but for those that the unchanged model
    predicts by NaN."""

    @property
    def ce_clean(self) -> float:
        return self.trained_rows.ce_clean

    @property
    def ce_spliced(self) -> float:
        return self.trained_rows.ce_spliced

    @property
    def ce_zero_ablated(self) -> float:
        return self.trained_rows.ce_zero_ablated

    @property
    def ce_loss_score(self) -> float:
        return self.trained_rows.ce_loss_score


def loss_recovered(
    lm: LanguageModel,
    hook: HookPoint,
    tokens: Int[Tensor, "n L"],
    reconstruct: Callable[[Rows], Rows],
    **options: Any,
) -> LossRecovered:
    """Cross-entropy of next tokens with activations clean, spliced and ablated.

    Args:
        reconstruct: the rows that replace the rows it gets, for instance `lambda x: sae(x)`.
        options: as in `losses_recovered`, which takes several at once.
    """
    return losses_recovered(lm, hook, tokens, {"": reconstruct}, **options)[""]


def losses_recovered(
    lm: LanguageModel,
    hook: HookPoint,
    tokens: Int[Tensor, "n L"],
    reconstructs: Mapping[str, Callable[[Rows], Rows]],
    **options: Any,
) -> dict[str, LossRecovered]:
    """The same for several SAEs at one hook, which share the passes that none of them changes.

    Args:
        options: as in `SpliceLosses`, which takes the tokens part by part.
    """
    losses = SpliceLosses(lm, hook, reconstructs, **options)
    losses.add(tokens)
    return losses.result()


class SpliceLosses:
    """The losses of several SAEs at one hook, summed in float64 over parts of the text.

    A token whose clean prediction is NaN counts nowhere: a row that is NaN in the model itself
    spoils its context, whatever is spliced.

    Args:
        reconstructs: by name, what replaces the rows it gets.
        row_filter: the rows an SAE is trained on, `Activations.row_filter`; first positions,
            special tokens and massive rows are then neither spliced nor ablated.
        every_position: splice and ablate all positions as well.
        kl: also the divergence of the predictions from the clean ones.
        mean: a row, usually the mean of the activations, to ablate with besides zeros.
        batch_contexts: contexts per forward pass; None chooses by device.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook: HookPoint,
        reconstructs: Mapping[str, Callable[[Rows], Rows]],
        *,
        row_filter: RowFilter,
        every_position: bool = True,
        kl: bool = False,
        mean: Float[Tensor, " D"] | None = None,
        batch_contexts: int | None = None,
    ) -> None:
        if batch_contexts is not None and batch_contexts < 1:
            raise ValueError(f"batch_contexts must be at least 1, got {batch_contexts}")
        self.lm, self.hook, self.names = lm, hook, list(reconstructs)
        self.batch_contexts, self.kl = batch_contexts, kl
        self.filters = {"trained": row_filter}
        if every_position:
            self.filters["every"] = RowFilter(skip_first=0, norm_limit=math.inf)
        self.changes: dict[_Change, Callable[[Rows], Rows]] = {("zero",): torch.zeros_like}
        if mean is not None:
            self.changes["mean",] = lambda rows: mean.to(rows).expand_as(rows)
        self.changes |= {("spliced", name): change for name, change in reconstructs.items()}
        self._sums, self._replay = _Sums(), None
        self._n_replaced = self._n_tokens = 0

    @torch.no_grad()
    def add(
        self, tokens: Int[Tensor, "n L"], progress: Callable[[int], None] | None = None
    ) -> None:
        """Run the model over these contexts, clean and with every change.

        Args:
            progress: called with the number of tokens done.

        Raises:
            ValueError: tokens without a next token; a reconstruction has another shape.
        """
        if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens must have the shape [n, L] with L >= 2, got {list(tokens.shape)}"
            )
        lm, hook, sums = self.lm, self.hook, self._sums
        step = self.batch_contexts or _default_batch(lm.device, tokens.shape[1])
        tokens = tokens.to(lm.device)
        self._n_tokens += tokens.numel()
        replay = self._replay = self._replay or Replay(lm, hook, tokens[:1])
        for i, batch in enumerate(tokens.split(step)):
            with replay.recorded():
                clean = lm.model(input_ids=batch, use_cache=False).logits
            known = clean[:, :-1].amax(-1).isfinite()  # NaN wherever one of the logits is
            sums.n_predicted += int(known.sum())
            sums.add("clean", clean, batch, known)
            for which, chosen in self.filters.items():
                for change, new_rows in self.changes.items():
                    edit = _Replace(chosen, batch, new_rows)
                    with replay.replayed(), splice(lm, hook, edit):
                        logits = lm.model(input_ids=batch, use_cache=False).logits
                    sums.add((which, *change), logits, batch, known, clean if self.kl else None)
                    if (which, change) == ("trained", ("zero",)):
                        self._n_replaced += edit.n_replaced
            if progress is not None:
                progress((i * step + len(batch)) * tokens.shape[1])

    def result(self) -> dict[str, LossRecovered]:
        """By name, means over all tokens so far."""
        sums, every = self._sums, "every" in self.filters
        return {
            name: LossRecovered(
                trained_rows=sums.loss("trained", name),
                every_position=sums.loss("every", name) if every else None,
                untouched_fraction=1 - self._n_replaced / self._n_tokens,
                n_predicted=sums.n_predicted,
            )
            for name in self.names
        }


_Change = tuple[str, ...]
"""What is put in the rows' place: "zero", "mean", or "spliced" and an SAE's name."""


class _Replace:
    """Puts new rows where the filter keeps rows, and leaves the others."""

    def __init__(
        self, row_filter: RowFilter, tokens: Tensor, new_rows: Callable[[Tensor], Tensor]
    ) -> None:
        self.row_filter, self.tokens, self.new_rows = row_filter, tokens, new_rows
        self.n_replaced = 0

    def __call__(self, x: Tensor) -> Tensor:
        keep = self.row_filter.keep(x, self.tokens)
        rows = x[keep]
        new = self.new_rows(rows)
        if new.shape != rows.shape:
            raise ValueError(
                "reconstruct must return the shape [N, D] of the rows it gets, "
                f"{list(rows.shape)}, got {list(new.shape)}"
            )
        self.n_replaced = len(rows)
        return x.masked_scatter(keep[..., None], new.to(x.dtype))


class _Sums:
    """Sums over tokens in float64; logits are handled a context at a time to spare memory."""

    def __init__(self) -> None:
        self.ce: dict[str | _Change, float] = {}
        self.kl: dict[str | _Change, float] = {}
        self.n_predicted = 0

    def add(
        self,
        name: str | _Change,
        logits: Tensor,
        tokens: Tensor,
        known: Bool[Tensor, "n P"],
        clean: Tensor | None = None,
    ) -> None:
        """The tokens whose prediction is known; `clean` asks for the divergence from it."""
        for i, targets in enumerate(tokens[:, 1:]):
            log_p = F.log_softmax(logits[i, :-1].float(), dim=-1)
            ce = -log_p.gather(1, targets[:, None]).squeeze(1)
            self.ce[name] = self.ce.get(name, 0.0) + _sum(ce[known[i]])
            if clean is not None:
                log_q = F.log_softmax(clean[i, :-1].float(), dim=-1)
                # Fewer passes over the vocabulary than `kl_div` makes.
                per_token = torch.linalg.vecdot(log_q.exp(), log_q - log_p)
                self.kl[name] = self.kl.get(name, 0.0) + _sum(per_token[known[i]])

    def loss(self, which: str, name: str) -> SpliceLoss:
        n = self.n_predicted or math.nan
        ce = {change: total / n for change, total in self.ce.items()}
        kl = {change: total / n for change, total in self.kl.items()}
        spliced, zero, mean = (which, "spliced", name), (which, "zero"), (which, "mean")
        return SpliceLoss(
            ce_clean=ce["clean"],
            ce_spliced=ce[spliced],
            ce_zero_ablated=ce[zero],
            ce_mean_ablated=ce.get(mean),
            kl_spliced=kl.get(spliced),
            kl_zero_ablated=kl.get(zero),
            kl_mean_ablated=kl.get(mean),
        )


def _sum(values: Tensor) -> float:
    return values.cpu().double().sum().item()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _default_batch(device: torch.device, length: int) -> int:
    """Contexts per pass: the logits of one pass, [n, L, vocabulary], must fit."""
    return max(1, (1024 if device.type == "cpu" else 8192) // length)
