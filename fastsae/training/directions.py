"""Where the latents' directions start: at random, or near rows of the data."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAE
from fastsae.saes.sharding import blocks

Directions = Literal["random", "rows"]

RANDOM_SHARE = 0.3
"""Of a random direction beside 1 of a row's: latents that start at equal rows are not the same."""


@torch.no_grad()
def start_at_rows(sae: SAE, rows: Float[Tensor, "N D"], mesh: Mesh, seed: int) -> None:
    """Point each latent of a tied dictionary near a row of a sample, seen from b_dec.

    W_dec[j] <- n_j u(u(x_i - b_dec) + RANDOM_SHARE u(W_dec[j])) and W_enc <- W_dec^T, with
    u(v) = v / |v|, n_j the norm that W_dec[j] has, and rows i in a seeded order, each once: latents
    for which no row is left stay at random. The rows are those of the first process, whatever the
    others hold.
    """
    rows = sae.prepare(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for latents, held, place in blocks(sae.cfg.d_sae, sae.latents):
        directions = rows.new_zeros(len(latents), rows.shape[1])
        if mesh.is_first:
            picked = rows[order[latents.start : latents.stop].to(rows.device)]
            directions[: len(picked)] = normalize(picked - sae.b_dec, dim=1)
        mesh.broadcast(directions)
        W_dec = sae.W_dec[place].float()
        near = normalize(directions[held] + RANDOM_SHARE * normalize(W_dec, dim=1), dim=1)
        sae.W_dec[place] = near * W_dec.norm(dim=1, keepdim=True)
        sae.W_enc.t()[place] = sae.W_dec[place]
