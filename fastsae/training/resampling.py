"""Dead latents, given the rows that are reconstructed worst to start again from."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastsae.saes import SAE, SAELoss
from fastsae.training.dense_optimizers import DenseOptimizer
from fastsae.training.optimizer import RowAdam

ENCODER_SHARE = 0.2
"""Norm of a new encoder column, of the mean one of the latents that fire."""


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: RowAdam | DenseOptimizer,
    loss: SAELoss,
    dead: Bool[Tensor, " F"],
    seed: int,
) -> Int[Tensor, " n"]:
    """Start dead latents again: Bricken et al. 2023, "Towards Monosemanticity", appendix.

    Each takes a row b of the batch, drawn with p_b ~ |err_b|^4 and no row twice:

        W_dec[j] = n_dec u(target_b - b_dec)
        W_enc[:, j] = n_enc u(x_b - b_pre) / 5,   b_enc[j] = 0

    where u(v) = v / |v| and n are the mean norms of the latents alive; what the optimizer knows of
    them is set to 0. A batch of fewer rows than there are dead latents starts as many as it has.

    Args:
        loss: of the batch, with its rows and errors.
        seed: decides the rows.

    Returns:
        The latents that were started again, ascending.
    """
    chance = loss.err.square().sum(1).double().square().cpu()
    n = min(int(dead.sum()), int((chance > 0).sum()))
    if n == 0 or bool(dead.all()):
        return torch.empty(0, dtype=torch.int64, device=dead.device)
    latents = dead.nonzero().squeeze(1)[:n]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(chance, n, generator=generator).to(dead.device)
    x = loss.x[rows].to(sae.dtype)
    target = x if loss.target is None else loss.target[rows].to(sae.dtype)
    decoder_norm = sae.W_dec.norm(dim=1)[~dead].mean()
    encoder_norm = sae.W_enc.norm(dim=0)[~dead].mean() * ENCODER_SHARE
    sae.W_dec[latents] = decoder_norm * normalize(target - sae.b_dec)
    sae.W_enc[:, latents] = (
        encoder_norm * normalize(x if sae.b_pre is None else x - sae.b_pre)
    ).t()
    for bias in sae.encoder_biases:
        bias[latents] = 0
    for parameter in (sae.W_dec, sae.W_enc, *sae.encoder_biases):
        for value in optimizer.state[parameter].values():
            if value.ndim and value.itemsize > 1:  # 8 bits are 0 under a scale of 0
                axis = 1 if parameter is sae.W_enc and value.shape == parameter.shape else 0
                value.index_fill_(axis, latents, 0)
    for parameter, copy in optimizer.copies.items():
        copy.copy_(parameter)
    return latents
