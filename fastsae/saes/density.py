"""Whether a batch's code is worth writing as pairs."""

import torch
from torch import Tensor

from fastsae.saes.base import SAE
from fastsae_kernels import threshold_encode

PROBE_ROWS = 64
"""Rows that tell."""
SPARSE_BELOW = 1 / 16
"""Of all latents: above, pairs take more room and time than dense chunks of rows."""


@torch.no_grad()
def is_sparse(sae: SAE, x: Tensor, threshold: float | Tensor = 0.0) -> bool:
    """Whether few of the pre-activations of a batch's rows are above a threshold.

    A function of the batch and the weights alone, so that a resumed run decides as the first did,
    and of all shards and parts, so that they decide alike.
    """
    probe = x[:: max(1, len(x) // PROBE_ROWS)]
    code = threshold_encode(
        probe, sae.W_enc, sae.b_enc, threshold=threshold, b_pre=sae.b_pre, impl=sae.impl
    )
    if sae.shards is None:
        return code.acts.numel() < SPARSE_BELOW * len(probe) * sae.cfg.d_sae
    share = code.acts.new_tensor(code.acts.numel() / len(probe))
    share = sae.shards.mean_of_parts(sae.shards.total(share))
    return bool(share < SPARSE_BELOW * sae.cfg.d_sae)
