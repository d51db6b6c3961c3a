"""EleutherAI's sparsify."""

import os

import torch
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step, quiet


def without_its_kernels() -> None:
    """Before it is imported where there is no GPU: it takes an installed triton for one."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


def sparsify_step(start: Start) -> Step:
    """sparsify's SparseCoder in the order of its trainer, with the Adam it takes on a CPU."""
    with quiet():
        without_its_kernels()
        from sparsify import SparseCoder, SparseCoderConfig

        case = start.case
        cfg = SparseCoderConfig(num_latents=case.F, k=case.K)
        sae = SparseCoder(case.D, cfg, device=start.device)
    assert sae.W_dec is not None
    with torch.no_grad():
        sae.encoder.weight.copy_(start.W_enc.t())
        sae.encoder.bias.copy_(start.b_enc)
        sae.W_dec.copy_(start.W_dec)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    since_fired = torch.zeros(case.F, dtype=torch.long, device=start.device)

    def step(x: Tensor) -> float:
        with quiet():
            sae.set_decoder_norm_to_unit_norm()
            out = sae(x=x, y=x, dead_mask=start.dead)
        (out.fvu + out.auxk_loss).backward()
        did_fire = torch.zeros_like(since_fired, dtype=torch.bool)
        did_fire[out.latent_indices.flatten()] = True
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x)).masked_fill_(did_fire, 0)
        spread = (x - x.mean(0)).square().sum()
        return float(out.fvu.detach() * spread / len(x))

    return step
