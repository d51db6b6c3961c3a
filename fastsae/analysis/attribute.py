"""Which latents speak for a token: direct contributions to its logit."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data.language_model import LanguageModel
from fastsae.saes import SAE
from fastsae_kernels import RaggedCode, SparseCode


def unembedding(model: Any) -> Float[Tensor, "D V"]:
    """W_U [D, V] of a fastsae, Hugging Face or TransformerLens model.

    Raises:
        TypeError: the model has no output embedding.
    """
    model = model.model if isinstance(model, LanguageModel) else model
    W_U = getattr(model, "W_U", None)
    if isinstance(W_U, Tensor):
        return W_U
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model must have an output embedding, got {type(model).__name__}")
    return head.weight.t()


@torch.no_grad()
def logit_attribution(
    sae: SAE,
    x: Float[Tensor, "... D"],
    W_U: Float[Tensor, "D V"],
    token: int,
    *,
    minus: int | None = None,
) -> SparseCode | RaggedCode:
    """What each active latent adds to a token's logit: acts * (W_dec @ W_U[:, token]).

    Only the active latents are looked at. This is the direct path: it neglects the final norm
    (whose scale all latents of a row share) and whatever later layers make of the latent. The
    difference of two tokens is free of what raises all logits alike.

    Args:
        x: residual stream at the SAE's hook.
        token: 0 <= token < V.
        minus: a token whose logit is taken off; None: none.

    Returns:
        The code of x with contributions in the place of acts, latents where they were.

    Raises:
        ValueError: a token is out of range.
    """
    for name, value in (("token", token), ("minus", minus)):
        if value is not None and not 0 <= value < W_U.shape[1]:
            raise ValueError(f"{name} must be in [0, V) with V = {W_U.shape[1]}, got {value}")
    direction = W_U[:, token] if minus is None else W_U[:, token] - W_U[:, minus]
    per_act = sae.W_dec @ direction.to(sae.W_dec)
    code = sae.decoder_code(sae.encode_sparse(x))
    return code._replace(acts=code.acts * per_act[code.indices.long()])


@torch.no_grad()
def top_latents(code: SparseCode | RaggedCode, d_sae: int, k: int = 10) -> list[tuple[int, float]]:
    """The k latents with the largest sums over all rows, largest first."""
    totals = torch.zeros(d_sae, dtype=code.acts.dtype, device=code.acts.device)
    totals.index_add_(0, code.indices.long().reshape(-1), code.acts.reshape(-1))
    best = totals.topk(min(k, d_sae))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
