"""Every default of a training run that depends on the run, in one place, with its reason."""

import math
from typing import Any

import torch

from fastsae.training.directions import Directions

EXPANSION = 16
"""F = 16 D."""
DEAD_WINDOW = 10_000_000
"""Tokens without firing after which a latent is dead, as in the literature, for long runs."""


def d_sae(d_in: int) -> int:
    return EXPANSION * d_in


def sae_fields(variant: str) -> dict[str, Any]:
    """Fields of a variant's configuration where a run's defaults are not the class's.

    Rows are scaled to norm sqrt(D) whatever the model, and the L1 weight is one for such rows.
    """
    own = {"standard": {"l1_coefficient": 5.0}}
    return {"normalize_activations": "expected_average_only_in", **own.get(variant, {})}


def directions(architecture: str) -> Directions:
    """Near rows where it was measured: at equal tokens FVU falls by 5 % and more of a known
    dictionary is recovered (docs/benchmarks.md)."""
    near_rows = architecture in ("topk", "batchtopk", "matryoshka_batchtopk")
    return "whitened_rows" if near_rows else "random"


def batch_size(device: torch.device, total_tokens: int) -> int:
    """Tokens a step: enough steps on a short run, enough work a step on a GPU."""
    largest = 8192 if device.type == "cuda" else 2048
    for_steps = 1 << max(0, int(math.log2(max(1, total_tokens / 750))))
    return max(256, min(largest, for_steps))


def compute_dtype(device: torch.device, sae_dtype: str) -> str:
    """bf16 products under fp32 weights on a GPU; on most CPUs bf16 is emulated."""
    return "bfloat16" if device.type == "cuda" and sae_dtype == "float32" else sae_dtype


def learning_rate(d_sae: int, kind: str = "row_adam") -> float:
    """3e-3 at F = 4608, falling with the square root of F (Gao et al. 2024, figure 3).

    Muon's updates are scaled to the size of Adam's; every element of signum's has the full size.
    """
    return 3e-3 * math.sqrt(4608 / d_sae) * (0.1 if kind == "signum" else 1.0)


def warm_up_steps(total_steps: int) -> int:
    return min(1000, total_steps // 16)


def decay_steps(total_steps: int, warm_up: int, lr_curve: str = "constant") -> int:
    """Linear from the peak to zero at the end; after a cosine, over the last half.

    A rate that is constant until half of the run and falls then ends 3 % higher in FVU.
    """
    return total_steps - warm_up if lr_curve == "constant" else total_steps // 2


def dead_window(total_tokens: int) -> int:
    """A tenth of a short run, so that AuxK has time to act."""
    return min(DEAD_WINDOW, max(1, total_tokens // 10))
