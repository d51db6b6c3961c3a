"""Weights, moments and gradients by rows, as tests of the row optimizer take them."""

import pytest
import torch

from fastsae_kernels import SparseCode, group_by_latent
from fastsae_kernels._row_grads import PairGrad, SubsetGrad

GPU = "cuda" if torch.cuda.is_available() else "cpu"


def device_for(impl):
    """Where an implementation runs; the kernels without a GPU in Triton's interpreter."""
    if impl != "triton":
        return "cpu"
    pytest.importorskip("triton")
    return GPU


def pair_grad(B=20, K=3, F=12, D=33, dtype=torch.float32):
    """Latent 2 on every row, latents 7 to 9 on none."""
    weights = torch.linspace(1, 0.1, F).expand(B, F).clone()
    weights[:, 2], weights[:, 7:10] = 1e6, 0
    indices = torch.multinomial(weights, K).int()
    groups = group_by_latent(SparseCode(torch.rand(B, K) + 0.1, indices), F)
    return PairGrad(groups, torch.randn(B * K), torch.randn(B, D).to(dtype))


def subset_grad(*latents, D=33):
    return SubsetGrad(torch.tensor(latents, dtype=torch.int64), torch.randn(len(latents), D))


def start_of(F=12, D=33, moments=torch.float32, copy=None):
    """Weight (a row of it 0), moments and copy, the same at each call."""
    rng = torch.Generator().manual_seed(7)
    weight, m = torch.randn(2, F, D, generator=rng)
    weight[4] = 0
    v = torch.rand(F, D, generator=rng)
    copies = [] if copy is None else [torch.zeros(F, D, dtype=copy)]
    return [weight, m.to(moments), v.to(moments), *copies]
