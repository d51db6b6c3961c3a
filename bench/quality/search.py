"""Hyperparameters by random search, as many trials for SAELens as for us, on validation rows."""

import random

from bench.quality.methods import Options

SEED = 1000
"""Of the trials: not one that the comparison trains with."""
SPACES: dict[str, dict[str, tuple]] = {
    "sae-lens": {
        "batch_size": (512, 1024, 2048),
        "lr": (5e-4, 1e-3, 2e-3, 4e-3),
        "warm_up": (0.02, 0.06, 0.12),
        "decay": (0.25, 0.5, 0.8),
        "decoder_init_norm": (0.1, 0.3),
        "dead_share": (0.1,),
        "normalize_activations": ("expected_average_only_in",),
    },
    "fastsae": {
        "batch_size": (512, 1024, 2048),
        "lr": (1e-3, 2e-3, 3e-3, 4e-3),
        "warm_up": (0.02, 0.06, 0.12),
        "decay": (0.25, 0.5, 0.8),
        "decoder_init_norm": (0.1, 0.3),
    },
}
"""A library -> a hyperparameter -> the values that are drawn from."""
KNOWN: dict[str, Options] = {
    "sae-lens": {
        "batch_size": 1024,
        "lr": 1e-3,
        "warm_up": 0.06,
        "decay": 0.25,
        "dead_share": 0.1,
        "normalize_activations": "expected_average_only_in",
    },
    "fastsae": {},
}
"""The first trial: what somebody who knows the library would take, and our defaults."""


def trial(library: str, number: int) -> Options:
    """The options of a trial, from 0."""
    if number == 0:
        return KNOWN[library]
    draw = random.Random(f"{library}:{number}")
    return {name: draw.choice(values) for name, values in SPACES[library].items()}


ABLATIONS: dict[str, Options] = {
    "the defaults": {},
    "batch of 512": {"batch_size": 512},
    "batch of 2048": {"batch_size": 2048},
    "lr / 2": {"lr": 1.5e-3},
    "lr * 2": {"lr": 6e-3},
    "decay over the last quarter": {"decay": 0.25},
    "decay over the last 80 %": {"decay": 0.8},
    "no warm-up": {"warm_up": 0.0},
    "betas 0.9, 0.99": {"betas": (0.9, 0.99)},
    "betas 0, 0.999": {"betas": (0.0, 0.999)},
    "without AuxK": {"aux_loss_coefficient": 0.0},
    "ranked without decoder norms": {"rescale_acts_by_decoder_norm": False},
    "rows as they are": {"normalize_activations": "none"},
    "rows whitened": {"normalize_activations": "covariance_whitening"},
    "b_dec not subtracted": {"apply_b_dec_to_input": False},
}
"""Each changes one thing of our defaults."""
