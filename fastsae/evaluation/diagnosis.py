"""What an evaluation means: each figure against its target, and the field to change for a miss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsae.saes import SAEConfig

CE_LOSS_SCORE = 0.9
"""Of the loss that zeroing the activations costs, the part that the SAE wins back."""
EXPLAINED_VARIANCE = 0.7
DEAD = 0.05
"""Latents that have not fired for the run's dead window."""
L0_RANGE = (10, 200)
"""Active latents a row, where no k decides it."""
L0_SLACK = 0.2
"""Relative distance from k of SAEs that choose over a batch and are used with a threshold."""
MORE_ACTIVE = {
    "k": "raise",
    "max_iterations": "raise",
    "l1_coefficient": "lower",
    "l0_coefficient": "lower",
}
"""The fields that decide how many latents are active, and what makes them more."""
OPPOSITE = {"raise": "lower", "lower": "raise"}


@dataclass(frozen=True)
class Verdict:
    metric: str
    value: float
    target: str
    met: bool
    change: str
    """What to change where the target is missed."""


def diagnose(trained: SAEConfig, report: dict[str, Any]) -> list[Verdict]:
    """The figures of a run on the rows that were trained on, against the targets above.

    Args:
        trained: configuration of the SAE in training, whose fields are named.
        report: what `evaluate` found, with the last line of the log under `training`; without
            cross-entropy nothing is said of it.
    """
    rows, ce = report["rows"], report["cross_entropy"]
    field = next((name for name in MORE_ACTIVE if hasattr(trained, name)), "sparsity")
    denser = MORE_ACTIVE.get(field, "lower")
    sparser = OPPOSITE[denser]
    k = getattr(trained, "k", None)
    low, high = L0_RANGE if k is None else (k * (1 - L0_SLACK), k * (1 + L0_SLACK))
    l0, dead = rows["l0"], report["training"]["dead"] / trained.d_sae
    towards = f"{denser if l0 < low else sparser} {field}" if k is None else "train on more tokens"
    better = f"train on more tokens, {denser} {field}, or raise d_sae"
    revived = "aux_loss_coefficient or " if hasattr(trained, "aux_loss_coefficient") else ""
    explained = rows["ev_saelens"]
    l0_target = f"{low:g} to {high:g}" if k is None else f"{k} within {L0_SLACK:.0%}"
    score = []
    if ce is not None:
        value = ce["trained_rows"]["ce_loss_score"]
        target = f"at least {CE_LOSS_SCORE}"
        score = [Verdict("CE loss score", value, target, value >= CE_LOSS_SCORE, better)]
    return [
        Verdict("L0", l0, l0_target, low <= l0 <= high, towards),
        *score,
        Verdict(
            "explained variance",
            explained,
            f"at least {EXPLAINED_VARIANCE}",
            explained >= EXPLAINED_VARIANCE,
            f"{better}; lower lr if the loss rose",
        ),
        Verdict(
            "dead latents",
            dead,
            f"at most {DEAD:.0%}",
            dead <= DEAD,
            f"lower lr or d_sae, or set {revived}resample_every",
        ),
    ]


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Metric, value, target and verdict, with the field to change for each miss."""
    lines = [f"{'':20}{'value':>9}  {'target':18}verdict"]
    for v in verdicts:
        said = "met" if v.met else f"missed: {v.change}"
        lines.append(f"{v.metric:20}{v.value:9.4f}  {v.target:18}{said}")
    return "\n".join(lines)
