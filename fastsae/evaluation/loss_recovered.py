"""What a reconstruction costs the language model: cross-entropy with it spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastsae.data.activations import RowFilter
from fastsae.data.hooks import HookPoint, splice
from fastsae.data.language_model import LanguageModel

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
    """Tokens the means are over: L - 1 for each context."""

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


@torch.no_grad()
def loss_recovered(
    lm: LanguageModel,
    hook: HookPoint,
    tokens: Int[Tensor, "n L"],
    reconstruct: Callable[[Rows], Rows],
    *,
    row_filter: RowFilter,
    every_position: bool = True,
    kl: bool = False,
    batch_contexts: int | None = None,
) -> LossRecovered:
    """Cross-entropy of next tokens with activations clean, spliced and zero-ablated.

    Args:
        reconstruct: the rows that replace the rows it gets, for instance `lambda x: sae(x)`.
        row_filter: the rows an SAE is trained on, `Activations.row_filter`; first positions and
            massive rows are then neither spliced nor ablated.
        every_position: splice and ablate all positions as well, in two more passes.
        kl: also the divergence of the predictions from the clean ones.
        batch_contexts: contexts per forward pass; None chooses by device.

    Raises:
        ValueError: tokens without a next token; `reconstruct` returned another shape.
    """
    if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must have the shape [n, L] with L >= 2, got {list(tokens.shape)}")
    if batch_contexts is not None and batch_contexts < 1:
        raise ValueError(f"batch_contexts must be at least 1, got {batch_contexts}")
    filters = {"trained": row_filter}
    if every_position:
        filters["every"] = RowFilter(skip_first=0, norm_limit=math.inf)
    sums = _Sums()
    step = batch_contexts or _default_batch(lm.device, tokens.shape[1])
    for batch in tokens.to(lm.device).split(step):
        clean = lm.model(input_ids=batch, use_cache=False).logits
        sums.add("clean", clean, batch)
        for name, chosen in filters.items():
            for change, new_rows in (("spliced", reconstruct), ("zero", torch.zeros_like)):
                edit = _Replace(chosen, new_rows)
                with splice(lm, hook, edit):
                    logits = lm.model(input_ids=batch, use_cache=False).logits
                sums.add(f"{name}_{change}", logits, batch, clean if kl else None)
                if name == "trained" and change == "spliced":
                    sums.n_replaced += edit.n_replaced
    n_predicted = len(tokens) * (tokens.shape[1] - 1)
    return LossRecovered(
        trained_rows=sums.loss("trained", n_predicted),
        every_position=sums.loss("every", n_predicted) if every_position else None,
        untouched_fraction=1 - sums.n_replaced / tokens.numel(),
        n_predicted=n_predicted,
    )


class _Replace:
    """Puts new rows where the filter keeps rows, and leaves the others."""

    def __init__(self, row_filter: RowFilter, new_rows: Callable[[Tensor], Tensor]) -> None:
        self.row_filter, self.new_rows = row_filter, new_rows
        self.n_replaced = 0

    def __call__(self, x: Tensor) -> Tensor:
        keep = self.row_filter.keep(x)
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
        self.ce: dict[str, float] = {}
        self.kl: dict[str, float] = {}
        self.n_replaced = 0

    def add(self, name: str, logits: Tensor, tokens: Tensor, clean: Tensor | None = None) -> None:
        for i, targets in enumerate(tokens[:, 1:]):
            log_p = F.log_softmax(logits[i, :-1].float(), dim=-1)
            ce = -log_p.gather(1, targets[:, None]).cpu().double().sum().item()
            self.ce[name] = self.ce.get(name, 0.0) + ce
            if clean is not None:
                log_q = F.log_softmax(clean[i, :-1].float(), dim=-1)
                per_token = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)
                self.kl[name] = self.kl.get(name, 0.0) + per_token.cpu().double().sum().item()

    def loss(self, name: str, n: int) -> SpliceLoss:
        spliced, zero = f"{name}_spliced", f"{name}_zero"
        return SpliceLoss(
            ce_clean=self.ce["clean"] / n,
            ce_spliced=self.ce[spliced] / n,
            ce_zero_ablated=self.ce[zero] / n,
            kl_spliced=self.kl[spliced] / n if self.kl else None,
            kl_zero_ablated=self.kl[zero] / n if self.kl else None,
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _default_batch(device: torch.device, length: int) -> int:
    """Contexts per pass: the logits of one pass, [n, L, vocabulary], must fit."""
    return max(1, (1024 if device.type == "cpu" else 8192) // length)
