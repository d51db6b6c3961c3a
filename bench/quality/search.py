"""Hyperparameters by random search, as many trials for SAELens as for us, on validation rows."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.quality.methods import Options, Setting, sae_config
from bench.quality.results import saved
from fastsae import DataConfig, TrainConfig

SEED = 1000
"""Of the trials: not one that the comparison trains with."""
SCHEDULES: dict[str, tuple] = {
    "batch_size": (256, 512, 1024),
    "lr": (1e-3, 2e-3, 3e-3, 4e-3),
    "warm_up": (0.02, 0.06, 0.12),
    "decay": (0.25, 0.5, 0.85),
    "beta2": (0.99, 0.999),
    "decoder_init_norm": (0.1, 0.3),
}
"""A hyperparameter -> the values that are drawn from; shares are of the run's steps."""
SCALED: Options = {"normalize_activations": "expected_average_only_in", "dead_share": 0.1}
"""Of every trial of SAELens, as of our defaults."""


def trial(library: str, number: int, setting: Setting) -> Options:
    """The options of a trial, from 0.

    The first of ours are our defaults, of SAELens's what somebody who knows it would take; its
    second is our schedule. The others are drawn.
    """
    ours = our_defaults(setting)
    if library == "fastsae" and number == 0:
        return ours
    if library == "sae-lens" and number < 2:
        known = {"batch_size": 1024, "lr": 1e-3, "beta2": 0.999, "warm_up": 0.06, "decay": 0.25}
        return {**SCALED, **({n: ours[n] for n in known} if number else known)}
    draw = random.Random(f"{library}:{number}")
    drawn = {name: draw.choice(values) for name, values in SCHEDULES.items()}
    return drawn if library == "fastsae" else {**SCALED, **drawn}


def our_defaults(setting: Setting) -> Options:
    """Written out, so that rows say what the defaults were when they were made."""
    data = DataConfig(total_tokens=setting.tokens)
    run = TrainConfig(sae=sae_config(setting, 1), data=data).resolved(torch.device("cpu"))
    return {
        "batch_size": run.data.batch_size,
        "lr": run.optimizer.lr,
        "beta2": run.optimizer.betas[1],
        "warm_up": (run.schedule.warm_up_steps or 0) / run.total_steps,
        "decay": (run.schedule.decay_steps or 0) / run.total_steps,
        "W_dec_init": run.W_dec_init,
    }


def tuned(setting: Setting) -> Options:
    """SAELens's best trial on TopK SAEs of the same rows."""
    tried = [
        row
        for row in saved()
        if row["bench"] == "quality-search"
        and row["library"] == "sae-lens"
        and row["setting"] == vars(replace(setting, architecture="topk"))
    ]
    if not tried:
        raise SystemExit(
            f"SAELens must be tuned before it is compared with, got no trial for {setting}: "
            "--parts search"
        )
    return min(tried, key=lambda row: row["fvu"])["options"]


RECIPES: dict[str, tuple[str, Callable[[Setting], Options]]] = {
    "fastsae": ("fastsae", our_defaults),
    "fastsae-random": (
        "fastsae",
        lambda setting: {**our_defaults(setting), "W_dec_init": "random"},
    ),
    "sae-lens": ("sae-lens", lambda setting: {}),
    "sae-lens-tuned": ("sae-lens", tuned),
    "sae-lens-tuned-own": ("sae-lens", lambda setting: {**tuned(setting), "own": True}),
    "sae-lens-our-schedule": ("sae-lens", lambda setting: trial("sae-lens", 1, setting)),
}
"""What is compared: a library, and its options in a setting."""

ABLATIONS: dict[str, Callable[[Options], Options]] = {
    "the defaults": lambda ours: {},
    "directions at random": lambda ours: {"W_dec_init": "random"},
    "constant lr, decay over the last half": lambda ours: {"decay": 0.5},
    "constant lr, decay over the last quarter": lambda ours: {"decay": 0.25},
    "no warm-up": lambda ours: {"warm_up": 0.0},
    "beta2 0.999": lambda ours: {"beta2": 0.999},
    "lr / 2": lambda ours: {"lr": ours["lr"] / 2},
    "lr * 1.5": lambda ours: {"lr": ours["lr"] * 1.5},
    "batch / 2": lambda ours: {"batch_size": ours["batch_size"] // 2},
    "batch * 2": lambda ours: {"batch_size": ours["batch_size"] * 2},
    "without AuxK": lambda ours: {"aux_loss_coefficient": 0.0},
    "ranked without decoder norms": lambda ours: {"rescale_acts_by_decoder_norm": False},
    "rows as they are": lambda ours: {"normalize_activations": "none"},
    "rows whitened": lambda ours: {"normalize_activations": "covariance_whitening"},
    "b_dec not subtracted": lambda ours: {"apply_b_dec_to_input": False},
}
"""Each changes one thing of our defaults."""
