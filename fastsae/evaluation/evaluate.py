"""One SAE on held-out text: reconstruction, sparsity, and what it costs the language model."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsae.data import Activations, HookPoint, LanguageModel
from fastsae.data.batches import CHUNK_ROWS
from fastsae.evaluation.loss_recovered import SpliceLoss, loss_recovered
from fastsae.evaluation.metrics import DEFINITIONS, ReconstructionMetrics
from fastsae.saes import SAE, TemporalSAE
from fastsae.saes.centred import mean_of, takes_centred_rows


@torch.no_grad()
def evaluate(
    sae: SAE,
    lm: LanguageModel,
    hook: HookPoint,
    held_out: Activations,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Metrics on held-out rows and the cross-entropy with the SAE spliced in.

    The headline leaves first positions and massive rows out, as training did; the same figures on
    all rows, and with every position spliced, stand beside it.

    Returns:
        `rows`, `all_rows` (see `definitions`), `cross_entropy` and the counts of rows left out.

    Raises:
        ValueError: the SAE reads sequences, and rows here have lost theirs.
    """
    if isinstance(sae, TemporalSAE):
        raise ValueError(
            "sae must read each row by itself to be evaluated on rows, got a temporal SAE"
        )
    centred = takes_centred_rows(sae.cfg.metadata, lm.model)
    metrics = {name: ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae) for name in ("rows", "all")}
    kept = held_out.rows.split(CHUNK_ROWS)
    # Spread over the batches: a batch of first positions alone has no variance to explain.
    excluded = held_out.excluded.tensor_split(len(kept))
    total = len(held_out.rows) + len(held_out.excluded)
    done = 0
    for rows, others in zip(kept, excluded, strict=True):
        x = torch.cat([rows, others.to(rows.dtype)]).to(sae.device, torch.float32)
        x = x - mean_of(x) if centred else x
        for name, part in (("rows", x[: len(rows)]), ("all", x)):
            code = sae.encode_sparse(part)
            x_hat = sae.decode(code).reshape(part.shape)
            metrics[name].update(part, x_hat, code.indices, code.acts)
        done += len(x)
        if progress is not None:
            progress(done, 2 * total)

    def reconstruct(x: Tensor) -> Tensor:
        return sae(x - mean_of(x)) + mean_of(x)

    spliced = partial(loss_recovered, lm, hook, held_out.tokens, row_filter=held_out.row_filter)
    found = spliced(reconstruct if centred else sae)
    as_they_are = spliced(sae, every_position=False) if centred else None
    if progress is not None:
        progress(2 * total, 2 * total)
    return {
        "model": lm.name,
        "hook": hook.name,
        "rows": metrics["rows"].result(),
        "all_rows": metrics["all"].result(),
        "cross_entropy": {
            "trained_rows": _loss(found.trained_rows),
            "every_position": found.every_position and _loss(found.every_position),
            "untouched_fraction": found.untouched_fraction,
            "predicted_tokens": found.n_predicted,
            # The SAE was trained without the rows' means: what taking them off is worth.
            "rows_not_centred": as_they_are and _loss(as_they_are.trained_rows),
        },
        "left_out": {
            "first_positions": held_out.n_first,
            "massive_rows": held_out.n_massive,
            "norm_limit": held_out.norm_limit,
        },
        "definitions": DEFINITIONS,
    }


def _loss(loss: SpliceLoss) -> dict[str, float | None]:
    return {**asdict(loss), "ce_loss_score": loss.ce_loss_score}


def report_table(report: dict[str, Any]) -> str:
    """The report as lines of text: figures on trained rows, and on everything beside them."""
    rows, everything = report["rows"], report["all_rows"]
    ce = report["cross_entropy"]
    trained, every = ce["trained_rows"], ce["every_position"]
    lines = [f"{'':28}{'trained rows':>14}{'all rows':>14}"]
    names = {
        "l0": "L0",
        "fvu": "FVU",
        "ev_saelens": "explained variance",
        "ev_saelens_legacy": "  SAELens, per token",
        "ev_sparsify": "  sparsify, per batch",
        "ev_dictlearning": "  dictionary_learning",
        "cosine_similarity": "cosine similarity",
        "dead_fraction": "not fired on held-out rows",
    }
    lines += [f"{n:28}{rows[key]:14.4f}{everything[key]:14.4f}" for key, n in names.items()]
    lines.append(f"{'':28}{'trained rows':>14}{'all positions':>14}")
    names = {
        "ce_clean": "CE clean (nats)",
        "ce_spliced": "CE with the SAE",
        "ce_zero_ablated": "CE zero-ablated",
        "ce_loss_score": "CE loss score",
    }
    lines += [f"{n:28}{trained[key]:14.4f}{every[key]:14.4f}" for key, n in names.items()]
    if ce["rows_not_centred"] is not None:
        before = ce["rows_not_centred"]["ce_spliced"]
        lines.append(
            f"the SAE was trained on centred rows: CE {before:.4f} on rows as they are, "
            f"{trained['ce_spliced']:.4f} on centred ones (above)"
        )
    left_out = report["left_out"]
    lines.append(
        f"left out of the first column: {left_out['first_positions']} first positions, "
        f"{left_out['massive_rows']} rows with a norm above {left_out['norm_limit']:.0f}"
    )
    return "\n".join(lines)
