"""Decodes, and the losses that hold one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rivals.inputs import Inputs, Run, backward, by_impl
from bench.roofline import DEAD
from fastsae_kernels import (
    Impl,
    SparseCode,
    aux_topk,
    mse_l1_loss,
    relu_l1_loss,
    sparse_decode,
)
from fastsae_kernels.decode.ops import pair_dots


def sparse_decode_runs(t: Inputs) -> dict[str, Run]:
    code, b_dec = t.code(), t.b_dec.detach()
    wide, acts = code.indices.long(), code.acts.to(t.dtype)

    def gathered(indices: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * acts.unsqueeze(2)).sum(1, dtype=torch.float32)

    def ours(impl: Impl) -> Tensor:
        return sparse_decode(code, t.half, b_dec, impl=impl)

    by_inductor = t.compiled(gathered)
    return {
        **by_impl(t.with_reference, ours),
        "embedding_bag int64": lambda: F.embedding_bag(
            wide, t.half, per_sample_weights=acts, mode="sum"
        ),
        "torch.compile": lambda: by_inductor(wide, acts, t.half),
    }


def mse_forward_runs(t: Inputs) -> dict[str, Run]:
    code, b_dec, W_dec = t.code(), t.b_dec.detach(), t.W_dec.detach()
    acts = code.acts.requires_grad_()
    made = SparseCode(acts, code.indices)
    wide, narrow = code.indices.long(), acts.detach().to(t.dtype)

    def ours(impl: Impl) -> Tensor:
        return mse_l1_loss(t.x, made, W_dec, b_dec, W_compute=t.half, impl=impl).mse

    def plain() -> Tensor:
        x_hat = F.embedding_bag(wide, t.half, per_sample_weights=narrow, mode="sum")
        return (x_hat.float() - t.x.float()).square().sum(1).mean()

    return {**by_impl(t.with_reference, ours), "embedding_bag": plain}


def mse_l1_loss_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    acts, wide = code.acts.requires_grad_(), code.indices.long()

    def ours(impl: Impl) -> Tensor:
        made = SparseCode(acts, code.indices)
        found = mse_l1_loss(t.x, made, t.W_dec, t.b_dec, W_compute=t.half, impl=impl)
        return backward(found.mse + found.l1, acts, t.W_dec)

    def bag() -> Tensor:
        x_hat = F.embedding_bag(wide, t.W_dec, per_sample_weights=acts, mode="sum")
        loss = (x_hat - t.x).square().sum(1).mean() + acts.abs().sum(1).mean()
        return backward(loss, acts, t.W_dec)

    return {**by_impl(t.with_reference, ours), "embedding_bag autograd": bag}


def pair_dots_runs(t: Inputs) -> dict[str, Run]:
    code, wide = t.code(), t.code().indices.long()
    x = t.x.float()

    def gathered(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * rows.unsqueeze(1)).sum(2, dtype=torch.float32)

    by_inductor = t.compiled(gathered)
    return {
        **by_impl(t.impls, lambda impl: pair_dots(None, code.indices, x, t.half, impl)),
        "torch.compile": lambda: by_inductor(wide, x, t.half),
    }


def aux_topk_runs(t: Inputs) -> dict[str, Run]:
    dead = torch.rand(t.case.F, generator=torch.Generator().manual_seed(1)) < DEAD
    dead, weights = dead.to(t.device), (t.W_enc, t.b_enc, t.W_dec)
    x = t.x.float()

    def ours(impl: Impl) -> Tensor:
        return backward(aux_topk(x, x, dead, *weights, b_pre=t.b_dec, impl=impl), *weights)

    return by_impl(t.with_reference, ours)


def relu_l1_loss_runs(t: Inputs) -> dict[str, Run]:
    """Chunks of rows are one implementation everywhere; the reference is the rival."""
    learned = t.W_enc, t.b_enc, t.W_dec, t.b_dec

    def plain() -> Tensor:
        W_enc, b_enc, W_dec, b_dec = (w.to(t.dtype) for w in learned)
        acts = torch.addmm(b_enc, t.x, W_enc).relu()
        mse = (torch.addmm(b_dec, acts, W_dec).float() - t.x).square().sum(1).mean()
        l1 = (acts @ torch.linalg.vector_norm(W_dec, dim=1)).float().mean()
        return backward(mse + l1, *learned)

    def ours() -> Tensor:
        found = relu_l1_loss(t.x, *learned, l1_coefficient=1.0, impl=Impl.EAGER)
        return backward(found.total, *learned)

    return {Impl.EAGER.value: ours, "dense autograd": plain}
