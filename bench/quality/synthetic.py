"""Recovery of a known dictionary: rows that sae_lens.synthetic superposes from true features.

FVU alone misleads: an SAE may explain rows by latents that are nobody's features. Here the features
are known, and found are F1 (how well a latent's firing tells that its best matching feature is
there) and MCC (mean cosine of the best one-to-one matching of decoder rows to features).
"""

from typing import Any

import torch
from torch import Tensor

from bench.providers.base import quiet
from bench.quality.methods import TRAINERS, Options, Setting, Watch
from bench.quality.scores import redundancy

FEATURES, WIDTH, K, ROWS = 1024, 128, 12, 400_000
EVALUATED = 20_000
"""Rows of the comparison with the truth."""


def setting_of(architecture: str) -> Setting:
    return Setting("synthetic", architecture, FEATURES, K, ROWS)


def superposition(seed: int) -> tuple[Any, Any]:
    """Feature directions, and who fires: frequencies fall as 1 / rank, about K at a time."""
    with quiet():
        from sae_lens.synthetic import (
            ActivationGenerator,
            FeatureDictionary,
            orthogonal_initializer,
        )
    torch.manual_seed(seed)
    features = FeatureDictionary(FEATURES, WIDTH, initializer=orthogonal_initializer(num_steps=50))
    frequency = 1 / torch.arange(10, FEATURES + 10)
    generator = ActivationGenerator(
        FEATURES,
        firing_probabilities=(frequency * K / frequency.sum()).clamp_max(0.9),
        std_firing_magnitudes=0.3,
    )
    return features, generator


@torch.no_grad()
def rows_of(features: Any, generator: Any, n: int) -> Tensor:
    return torch.cat([features(generator.sample(4096)) for _ in range(-(-n // 4096))])[:n]


def recovery(library: str, options: Options, architecture: str, seed: int) -> dict[str, float]:
    """Train on the superposition and compare with the truth."""
    with quiet():
        from sae_lens.synthetic import eval_sae_on_synthetic_data
    features, generator = superposition(seed)
    rows = rows_of(features, generator, ROWS)
    setting = setting_of(architecture)
    clock = Watch(validation=rows[:1], every=10**9)
    sae: Any = TRAINERS[library](setting, rows, seed, clock, options).sae
    torch.manual_seed(seed)  # all methods are shown the same rows
    found = eval_sae_on_synthetic_data(sae, features, generator, EVALUATED, 4096)
    return {
        "f1": float(found.classification.f1_score),
        "mcc": float(found.mcc),
        "uniqueness": float(found.uniqueness),
        "explained_variance": float(found.explained_variance),
        "dead": found.dead_latents / FEATURES,
        **redundancy(sae.W_dec),
        "features_cosine": redundancy(features.feature_vectors)["decoder_cosine"],
    }
