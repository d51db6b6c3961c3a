"""SAEs on held-out text: reconstruction, sparsity, and what they cost the language model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.data import Activations, HookPoint, LanguageModel, harvest
from fastsae.data.batches import CHUNK_ROWS
from fastsae.evaluation.loss_recovered import LossRecovered, SpliceLoss, SpliceLosses
from fastsae.evaluation.metrics import DEFINITIONS, ReconstructionMetrics
from fastsae.saes import SAE, TemporalSAE
from fastsae.saes.centred import mean_of, takes_centred_rows

PART_TOKENS = 65_536
"""Tokens whose rows an evaluation on text holds at once."""


def evaluate(
    sae: SAE,
    lm: LanguageModel,
    hook: HookPoint,
    held_out: Activations,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Metrics on held-out rows and the cross-entropy with the SAE spliced in.

    The headline leaves first positions, special tokens and massive rows out, as training did; the
    same figures on all rows, and with every position spliced, stand beside it.

    Returns:
        `rows`, `all_rows` (see `definitions`), `cross_entropy` and the counts of rows left out.

    Raises:
        ValueError: the SAE reads sequences, and rows here have lost theirs.
    """
    return evaluate_several({"": sae}, lm, hook, held_out, progress=progress)[""]


def evaluate_several(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    hook: HookPoint,
    held_out: Activations,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """`evaluate` of several SAEs at one hook, by name.

    The rows are those of one pass through the model, and the passes with activations clean and
    ablated are run once for all.
    """
    evaluation = Evaluation(saes, lm, hook, held_out)
    evaluation.add(held_out, progress)
    return evaluation.reports()


def evaluate_on_text(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    hook: HookPoint,
    tokens: Int[Tensor, "n L"],
    *,
    part_tokens: int = PART_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    **row_options: Any,
) -> dict[str, dict[str, Any]]:
    """`evaluate_several` of any number of contexts, of which the rows of one part are in memory.

    The first part decides the median norm, and the row that the model is mean-ablated with.

    Args:
        part_tokens: of a part, whole contexts.
        row_options: which rows are kept, as in `harvest_all`.
        progress: called with the number of tokens done and the number of tokens in all.

    Raises:
        ValueError: no tokens; an SAE that reads sequences, or none.
    """
    if len(tokens) == 0:
        raise ValueError("tokens must hold at least one context, got none")
    evaluation: Evaluation | None = None
    median: list[float] | None = None
    length, passes, first = tokens.shape[1], 1 + _passes(saes), 0

    def tell(first: int, before: int, done: int, *_: int) -> None:
        """Of a part: tokens times passes, those of its harvest and of `Evaluation.add`."""
        if progress is not None:
            progress(first * length + (before + done) // passes, tokens.numel())

    for part in tokens.split(max(1, part_tokens // length)):
        held_out = harvest(
            *(lm, hook, part),
            median_norms=median,
            first_context=first,
            progress=partial(tell, first, 0),
            **row_options,
        )
        evaluation = evaluation or Evaluation(saes, lm, hook, held_out)
        evaluation.add(held_out, partial(tell, first, part.numel()))
        median = [held_out.median_norm]
        first += len(part)
    assert evaluation is not None
    return evaluation.reports()


def _passes(saes: Mapping[str, SAE]) -> int:
    """Over the rows or through the model: each SAE's rows; clean; zeros, means and each SAE
    spliced, into the rows that are trained on and into all."""
    return len(saes) + 1 + 2 * (2 + len(saes))


class Evaluation:
    """Figures of several SAEs at one hook, accumulated over parts of the held-out text.

    Args:
        like: activations whose mean row the model is ablated with and whose rules say which rows
            are spliced, usually the first part.

    Raises:
        ValueError: no SAE, or one that reads sequences: rows here have lost theirs.
    """

    def __init__(
        self, saes: Mapping[str, SAE], lm: LanguageModel, hook: HookPoint, like: Activations
    ) -> None:
        for name, sae in saes.items():
            if isinstance(sae, TemporalSAE):
                raise ValueError(
                    "sae must read each row by itself to be evaluated on rows, "
                    f"got a temporal SAE {name}"
                )
        if not saes:
            raise ValueError("saes must hold at least one SAE, got none")
        self.saes, self.lm, self.hook = saes, lm, hook
        self.norm_limit = like.norm_limit
        centred = {n for n, sae in saes.items() if takes_centred_rows(sae.cfg.metadata, lm.model)}
        self._rows = {name: RowMetrics(sae, centred=name in centred) for name, sae in saes.items()}
        mean = like.rows.mean(0, dtype=torch.float32)
        spliced = partial(SpliceLosses, lm, hook, row_filter=like.row_filter, kl=True, mean=mean)
        around = {n: _around_means(sae) if n in centred else sae for n, sae in saes.items()}
        self._losses = spliced(around)
        as_they_are = {name: saes[name] for name in centred}
        self._as_they_are = spliced(as_they_are, every_position=False) if centred else None
        self._left_out = dict.fromkeys(("first_positions", "special_tokens", "massive_rows"), 0)

    @torch.no_grad()
    def add(
        self, held_out: Activations, progress: Callable[[int, int], None] | None = None
    ) -> None:
        tell = progress or (lambda *_: None)
        n, passes = held_out.tokens.numel(), _passes(self.saes)
        for i, metrics in enumerate(self._rows.values()):
            metrics.add(held_out.rows, held_out.excluded)
            tell((i + 1) * n, passes * n)
        of_rows = len(self.saes)
        spliced = lambda done: tell(of_rows * n + (passes - of_rows) * done, passes * n)
        self._losses.add(held_out.tokens, spliced)
        if self._as_they_are is not None:
            self._as_they_are.add(held_out.tokens)
        self._left_out["first_positions"] += held_out.n_first
        self._left_out["special_tokens"] += held_out.n_special
        self._left_out["massive_rows"] += held_out.n_massive

    def reports(self) -> dict[str, dict[str, Any]]:
        """By name, as `evaluate` returns it."""
        found = self._losses.result()
        as_they_are = {} if self._as_they_are is None else self._as_they_are.result()
        return {
            name: {
                "model": self.lm.name,
                "hook": self.hook.name,
                **metrics.results(),
                "cross_entropy": _cross_entropy(found[name], as_they_are.get(name)),
                "left_out": {**self._left_out, "norm_limit": self.norm_limit},
                "definitions": DEFINITIONS,
            }
            for name, metrics in self._rows.items()
        }


@torch.no_grad()
def evaluate_on_rows(
    saes: Mapping[str, SAE],
    rows: Float[Tensor, "N D"],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The part of `evaluate_several` that needs no language model.

    Returns:
        By name: `rows` and their `definitions`; `all_rows`, `cross_entropy` and `left_out` are
        None.
    """
    found: dict[str, dict[str, Any]] = {}
    for i, (name, sae) in enumerate(saes.items()):
        metrics = RowMetrics(sae, centred=False)
        metrics.add(rows, rows[:0])
        unknown = dict.fromkeys(("all_rows", "cross_entropy", "left_out"))
        found[name] = {**metrics.results(), **unknown, "definitions": DEFINITIONS}
        if progress is not None:
            progress((i + 1) * len(rows), len(saes) * len(rows))
    return found


class RowMetrics:
    """Figures of an SAE on the rows that are trained on, and on all."""

    def __init__(self, sae: SAE, *, centred: bool) -> None:
        self.sae, self.centred = sae, centred
        self.kept = ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae)
        self.all = ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae)

    def add(self, rows: Tensor, excluded: Tensor) -> None:
        kept = rows.split(CHUNK_ROWS)
        # Spread over the batches: a batch of first positions alone has no variance to explain.
        left_out = excluded.tensor_split(len(kept))
        for part_kept, others in zip(kept, left_out, strict=True):
            x = torch.cat([part_kept, others.to(part_kept.dtype)])
            x = x.to(self.sae.device, torch.float32)
            x = x - mean_of(x) if self.centred else x
            for metrics, part in ((self.kept, x[: len(part_kept)]), (self.all, x)):
                code = self.sae.encode_sparse(part)
                x_hat = self.sae.decode(code).reshape(part.shape)
                metrics.update(part, x_hat, code.indices, code.acts)

    def results(self) -> dict[str, Any]:
        return {"rows": self.kept.result(), "all_rows": self.all.result()}


def _around_means(sae: SAE) -> Callable[[Tensor], Tensor]:
    return lambda x: sae(x - mean_of(x)) + mean_of(x)


def _cross_entropy(found: LossRecovered, as_they_are: LossRecovered | None) -> dict[str, Any]:
    return {
        "trained_rows": _loss(found.trained_rows),
        "every_position": found.every_position and _loss(found.every_position),
        "untouched_fraction": found.untouched_fraction,
        "predicted_tokens": found.n_predicted,
        # The SAE was trained without the rows' means: what taking them off is worth.
        "rows_not_centred": as_they_are and _loss(as_they_are.trained_rows),
    }


def _loss(loss: SpliceLoss) -> dict[str, float | None]:
    return {**asdict(loss), "ce_loss_score": loss.ce_loss_score, "kl_score": loss.kl_score}


def report_table(report: dict[str, Any]) -> str:
    """The report as lines of text: figures on trained rows, and on everything beside them."""
    rows, everything = report["rows"], report["all_rows"]
    columns = ("trained rows",) if everything is None else ("trained rows", "all rows")
    lines = [f"{'':28}" + "".join(f"{column:>14}" for column in columns)]
    names = {
        "l0": "L0",
        "fvu": "FVU",
        "ev_saelens": "explained variance",
        "ev_saelens_legacy": "  SAELens, per token",
        "ev_sparsify": "  sparsify, per batch",
        "ev_dictlearning": "  dictionary_learning",
        "ev_saebench": "  SAEBench 0.6.0",
        "ev_openai": "  OpenAI, in training",
        "ev_overcomplete": "  overcomplete",
        "nmse_openai": "normalised MSE, OpenAI",
        "cosine_similarity": "cosine similarity",
        "l2_ratio": "norm of x_hat over x's",
        "dead_fraction": "not fired on held-out rows",
        "density_p50": "density, median latent",
        "density_max": "  most frequent latent",
    }
    for key, name in names.items():
        figures = (rows,) if everything is None else (rows, everything)
        lines.append(f"{name:28}" + "".join(f"{figure[key]:14.4f}" for figure in figures))
    ce = report["cross_entropy"]
    if ce is None:
        return "\n".join([*lines, "cross-entropy: fastsae eval, which runs the language model"])
    trained, every = ce["trained_rows"], ce["every_position"]
    lines.append(f"{'':28}{'trained rows':>14}{'all positions':>14}")
    names = {
        "ce_clean": "CE clean (nats)",
        "ce_spliced": "CE with the SAE",
        "ce_zero_ablated": "CE zero-ablated",
        "ce_mean_ablated": "CE mean-ablated",
        "ce_loss_score": "CE loss score",
        "kl_spliced": "KL from clean (nats)",
        "kl_score": "KL score",
    }
    lines += [f"{n:28}{trained[key]:14.4f}{every[key]:14.4f}" for key, n in names.items()]
    lines.append(f"{'positions left untouched':28}{ce['untouched_fraction']:14.4f}{0:14.4f}")
    if ce["rows_not_centred"] is not None:
        before = ce["rows_not_centred"]["ce_spliced"]
        lines.append(
            f"the SAE was trained on centred rows: CE {before:.4f} on rows as they are, "
            f"{trained['ce_spliced']:.4f} on centred ones (above)"
        )
    left_out = report["left_out"]
    lines.append(
        f"left out of the first column: {left_out['first_positions']} first positions, "
        f"{left_out['special_tokens']} special tokens, "
        f"{left_out['massive_rows']} rows with a norm above {left_out['norm_limit']:.0f}"
    )
    return "\n".join(lines)


def comparison_table(reports: Mapping[str, dict[str, Any]]) -> str:
    """A line an SAE, of its figures on the rows that are trained on."""
    width = max(len(name) for name in reports)
    names = ("L0", "FVU", "cosine", "not fired", "CE score", "KL score")
    lines = [f"{'':{width}}" + "".join(f"{name:>11}" for name in names)]
    for name, report in reports.items():
        rows, ce = report["rows"], (report["cross_entropy"] or {}).get("trained_rows") or {}
        figures = [rows[key] for key in ("l0", "fvu", "cosine_similarity", "dead_fraction")]
        figures += [ce.get(key, math.nan) for key in ("ce_loss_score", "kl_score")]
        lines.append(f"{name:{width}}" + "".join(f"{figure:11.4f}" for figure in figures))
    return "\n".join(lines)
