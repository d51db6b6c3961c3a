"""The runs of the SAEs that one run trains side by side."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fastsae.saes import SAES
from fastsae.training.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from fastsae.training.run_config import LanguageModelRun

SET_BY_THE_RUN = ("d_in", "reshape_activations", "metadata")
"""Fields of an SAE's configuration that follow from the model, the hook and the text."""
OWN = (
    "variant",
    "layer",
    "hook",
    "seed",
    "resample_every",
    "b_dec_init",
    "W_dec_init",
    "finetune_from",
)
"""Fields of a run in which SAEs that are trained side by side may differ."""


def runs_of(run: LanguageModelRun) -> dict[str, LanguageModelRun]:
    """The run of each SAE, by the name of its folder: "", `out` itself, if there is one only.

    Raises:
        ValueError: `also` names a field that cannot differ, or the same SAE twice.
    """
    if not run.also:
        return {"": run}
    runs = {"base": replace(run, also=())}
    for changes in run.also:
        name = ",".join(f"{key}={value}" for key, value in changes.items()).replace("/", "_")
        if not changes or name in runs:
            raise ValueError(f"also must hold different SAEs, got {changes} twice or empty")
        runs[name] = _changed(run, changes)
    return runs


def changes_in(text: str) -> dict[str, Any]:
    """Fields and values of `k=16 variant=batchtopk`; a value is JSON or a plain word.

    Raises:
        ValueError: a part has no `=`.
    """
    changes: dict[str, Any] = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"also must hold parts like k=16, got {part!r}")
        try:
            changes[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            changes[key.replace("-", "_")] = value
    return changes


def _changed(run: LanguageModelRun, changes: dict[str, Any]) -> LanguageModelRun:
    own = {key: value for key, value in changes.items() if key in OWN}
    if "layer" in own or "hook" in own:
        own = {"layer": None, "hook": None, **own}
    variant = own.get("variant", run.variant)
    if variant not in SAES:
        raise ValueError(f"variant must be one of {sorted(SAES)}, got {variant!r}")
    of_optimizer, of_schedule = (
        [f.name for f in fields(part)] for part in (OptimizerConfig, ScheduleConfig)
    )
    of_sae = [f.name for f in fields(SAES[variant].config_class) if f.name not in SET_BY_THE_RUN]
    known = [*OWN, *of_optimizer, *of_schedule, *of_sae]
    for key in changes:
        if key not in known:
            raise ValueError(f"also must hold fields among {known}, got {key!r}")
    changed = lambda names: {key: value for key, value in changes.items() if key in names}
    kept = run.sae if variant == run.variant else {"d_sae": run.sae.get("d_sae")}
    return replace(
        run,
        **own,
        sae={**kept, **changed(of_sae)},
        optimizer=replace(run.optimizer, **changed(of_optimizer)),
        schedule=replace(run.schedule, **changed(of_schedule)),
        also=(),
    )
