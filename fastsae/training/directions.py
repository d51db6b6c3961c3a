"""Where the latents' directions start: at random, or near whitened rows of the data."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAE
from fastsae.saes.sharding import blocks

Directions = Literal["random", "whitened_rows"]

RANDOM_SHARE = 0.3
"""Of a random direction beside 1 of a row's: latents that start at equal rows are not the same."""
RIDGE = 1e-5
"""Added to each variance, of their mean: a sample of fewer rows than D has none in some."""
CANDIDATES = 8
"""Most rows that are looked at for each that is picked."""
AT_ONCE = 64
"""Rows that are picked without being compared with each other."""


@torch.no_grad()
def start_at_whitened_rows(sae: SAE, rows: Float[Tensor, "N D"], mesh: Mesh, seed: int) -> None:
    """Point each latent of a tied dictionary near a row of a sample, seen from b_dec and whitened.

    W_dec[j] <- n_j u(z_i + RANDOM_SHARE u(W_dec[j])) and W_enc <- W_dec^T, with u(v) = v / |v|, n_j
    the norm that W_dec[j] has, and z_i of `whitened`, picked by `apart`: latents for which no row
    is left stay at random. Whitened, rows differ by what is particular to each and not by the few
    directions in which all of them vary most. The rows are those of the first process, whatever the
    others hold.
    """
    picked = rows[:0]
    if mesh.is_first:
        picked = apart(whitened(sae.prepare(rows).float() - sae.b_dec), sae.cfg.d_sae, seed)
    for latents, held, place in blocks(sae.cfg.d_sae, sae.latents):
        directions = sae.W_dec.new_zeros(len(latents), sae.cfg.d_in, dtype=torch.float32)
        mine = picked[latents.start : latents.stop]
        directions[: len(mine)] = mine
        mesh.broadcast(directions)
        W_dec = sae.W_dec[place].float()
        near = normalize(directions[held] + RANDOM_SHARE * normalize(W_dec, dim=1), dim=1)
        sae.W_dec[place] = near * W_dec.norm(dim=1, keepdim=True)
        sae.W_enc.t()[place] = sae.W_dec[place]


def whitened(x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """u(C^(-1/2) x_i), with C = x^T x / N and the ridge."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax().clamp_min(tiny)  # whose squares are in range, whatever the rows' size
    covariance = x.t() @ x / len(x)
    # On an Apple GPU there is no eigh.
    variances, vectors = torch.linalg.eigh(covariance.cpu() if x.is_mps else covariance)
    roots = (variances.clamp_min(0) + RIDGE * variances.mean()).clamp_min(tiny).sqrt()
    return normalize(x @ (vectors / roots @ vectors.t()).to(x.device), dim=1)


def apart(rows: Float[Tensor, "N D"], n: int, seed: int) -> Float[Tensor, "n D"]:
    """At most n of the unit rows, each once, in a seeded order; where there are several for each,
    of every few those whose largest cosine to what is already picked is the least."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    order = order.to(rows.device)
    candidates = min(CANDIDATES, len(rows) // n)
    if candidates < 2:
        return rows[order[:n]]
    picked = rows.new_zeros(n, rows.shape[1])
    for done, some in zip(range(0, n, AT_ONCE), order.split(candidates * AT_ONCE), strict=False):
        some = rows[some]
        nearest = (some @ picked[: done + 1].t()).amax(1)  # the last of these is still zero
        least = nearest.argsort(stable=True)[: min(AT_ONCE, n - done)]
        picked[done : done + len(least)] = some[least]
    return picked
