"""How good an SAE is: reconstruction metrics, and the language model's loss with it spliced in."""

from fastsae.evaluation.loss_recovered import (
    LossRecovered,
    SpliceLoss,
    SpliceLosses,
    loss_recovered,
    losses_recovered,
)
from fastsae.evaluation.metrics import DEFINITIONS, ReconstructionMetrics

__all__ = [
    "DEFINITIONS",
    "LossRecovered",
    "ReconstructionMetrics",
    "SpliceLoss",
    "SpliceLosses",
    "loss_recovered",
    "losses_recovered",
]
