"""Every op, ours and its rivals: what `bench.ops` checks and times."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, rows
from fastsae_kernels import (
    DenseGrad,
    Impl,
    SparseCode,
    aux_topk,
    group_by_latent,
    mse_l1_loss,
    row_adam,
    sparse_decode,
    topk_encode,
)
from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._row_grads import PairGrad
from fastsae_kernels.decode.ops import pair_dots
from fastsae_kernels.grouping.ops import segment_sum

Run = Callable[[], Tensor]
"""Does the work once and returns the value that parity is checked on."""


class Inputs:
    """What the ops and their rivals read. W_enc and W_dec are the fp32 masters."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        W = torch.randn(case.F, case.D, device=device, generator=generator)
        # Masters that their copies represent exactly, so that those who read either agree.
        W = W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True)).to(self.dtype)
        self.x = rows(case).to(device, self.dtype)
        self.W_enc = W.to(torch.float32, copy=True).t().requires_grad_()
        self.W_dec = W.to(torch.float32, copy=True).requires_grad_()
        self.b_enc = torch.zeros(case.F, device=device, requires_grad=True)
        self.b_dec = torch.zeros(case.D, device=device, requires_grad=True)
        self.half = W
        """[F, D], the encoder's and the decoder's weights as the products read them."""
        kernels = device == "cuda" or interpreted()
        self.impls = [Impl.TRITON, Impl.EAGER] if kernels else [Impl.EAGER]

    def code(self) -> SparseCode:
        with torch.no_grad():
            return topk_encode(self.x, self.W_enc, self.b_enc, self.case.K, W_compute=self.half.t())

    def compiled(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Inductor's C++ takes minutes to build on a CPU; the graph is the same.
        return torch.compile(run, backend="inductor" if self.device == "cuda" else "aot_eager")


def backward(loss: Tensor, *inputs: Tensor) -> Tensor:
    """Run the backward pass; the first gradient stands for all of them."""
    return torch.autograd.grad(loss, inputs)[0]


def topk_encode_runs(t: Inputs) -> dict[str, Run]:
    k, half, bias = t.case.K, t.half.t(), t.b_enc.detach().to(t.dtype)

    def plain() -> Tensor:
        return torch.addmm(bias, t.x, half).relu().topk(k, dim=1).values

    def ours(impl: Impl) -> Tensor:
        with torch.no_grad():
            return topk_encode(t.x, t.W_enc, t.b_enc, k, W_compute=half, impl=impl).acts

    return {
        **_by_impl(t, ours),
        "mm": lambda: torch.mm(t.x, half),
        "mm + torch.topk": plain,
    }


def topk_encode_backward_runs(t: Inputs) -> dict[str, Run]:
    k, weights = t.case.K, (t.W_enc, t.b_enc)

    def plain() -> Tensor:
        scores = torch.addmm(t.b_enc.to(t.dtype), t.x, t.W_enc.to(t.dtype))
        return backward(scores.relu().topk(k, dim=1).values.float().sum(), *weights)

    def ours(impl: Impl) -> Tensor:
        code = topk_encode(t.x, *weights, k, W_compute=t.half.t(), impl=impl)
        return backward(code.acts.sum(), *weights)

    return {**_by_impl(t, ours), "mm + torch.topk": plain}


def sparse_decode_runs(t: Inputs) -> dict[str, Run]:
    code, b_dec = t.code(), t.b_dec.detach()
    wide, acts = code.indices.long(), code.acts.to(t.dtype)

    def gathered(indices: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * acts.unsqueeze(2)).sum(1, dtype=torch.float32)

    by_inductor = t.compiled(gathered)
    return {
        **_by_impl(t, lambda impl: sparse_decode(code, t.half, b_dec, impl=impl)),
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

    return {**_by_impl(t, ours), "embedding_bag": plain}


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

    return {**_by_impl(t, ours), "embedding_bag autograd": bag}


def pair_dots_runs(t: Inputs) -> dict[str, Run]:
    code, wide = t.code(), t.code().indices.long()
    x = t.x.float()

    def gathered(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * rows.unsqueeze(1)).sum(2, dtype=torch.float32)

    by_inductor = t.compiled(gathered)
    runs: dict[str, Run] = {
        impl.value: lambda impl=impl: pair_dots(None, code.indices, x, t.half, impl)
        for impl in t.impls
    }
    return {**runs, "torch.compile": lambda: by_inductor(wide, x, t.half)}


def group_by_latent_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    flat = code.indices.reshape(-1).long()

    def plain() -> Tensor:
        flat.argsort(stable=True)
        return flat.bincount(minlength=t.case.F)

    ours = Impl.TRITON if t.device == "cuda" else Impl.EAGER  # they are one here
    return {
        ours.value: lambda: group_by_latent(code, t.case.F).counts(),
        "argsort + bincount": plain,
    }


def segment_sum_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    latents, by_row = code.indices.reshape(-1).long(), code.acts.reshape(-1, 1)

    def scattered() -> Tensor:
        terms = (operand.unsqueeze(1) * by_row.view(*code.acts.shape, 1)).flatten(0, 1)
        return torch.zeros_like(t.W_dec).index_add_(0, latents, terms)

    runs: dict[str, Run] = {
        impl.value: lambda impl=impl: segment_sum(groups, coef, operand, impl) for impl in t.impls
    }
    return {**runs, "index_add_": scattered}


def aux_topk_runs(t: Inputs) -> dict[str, Run]:
    dead = torch.rand(t.case.F, generator=torch.Generator().manual_seed(1)) < 0.05
    dead, weights = dead.to(t.device), (t.W_enc, t.b_enc, t.W_dec)
    x = t.x.float()

    def ours(impl: Impl) -> Tensor:
        return backward(aux_topk(x, x, dead, *weights, b_pre=t.b_dec, impl=impl), *weights)

    return _by_impl(t, ours)


def row_adam_runs(t: Inputs) -> dict[str, Run]:
    """An update by a gradient that is there."""
    shape = (t.case.F, t.case.D)
    generator = torch.Generator(t.device).manual_seed(2)
    weight, g = (torch.randn(shape, device=t.device, generator=generator) for _ in range(2))
    runs: dict[str, Run] = {}
    for impl in t.impls:
        runs[impl.value] = _row_adam_run(weight, [DenseGrad(g)], impl)
    return {**runs, "torch.optim.Adam(fused)": _fused_adam_run(weight, lambda: g)}


def update_runs(t: Inputs) -> dict[str, Run]:
    """From the pairs of a step to new weights and the copy that the next step reads."""
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    weight, copy = t.W_dec.detach(), torch.empty_like(t.half, dtype=torch.bfloat16)
    grads = [PairGrad(groups, coef, operand)]
    runs: dict[str, Run] = {}
    for impl in t.impls:
        runs[impl.value] = _row_adam_run(weight, grads, impl, copy)
    ours = t.impls[0]
    summed = lambda: segment_sum(groups, coef, operand, ours)
    return {**runs, "segment_sum, Adam(fused), copy": _fused_adam_run(weight, summed, copy)}


def _row_adam_run(weight: Tensor, grads: Any, impl: Impl, copy: Tensor | None = None) -> Run:
    mine, moments = weight.clone(), (torch.zeros_like(weight), torch.zeros_like(weight))
    steps = iter(range(1, 10**9))

    def run() -> Tensor:
        row_adam(mine, grads, *moments, step=next(steps), lr=1e-3, copy=copy, impl=impl)
        return mine

    return run


def _fused_adam_run(
    weight: Tensor, gradient: Callable[[], Tensor], copy: Tensor | None = None
) -> Run:
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)

    def run() -> Tensor:
        parameter.grad = gradient()
        optimizer.step()
        parameter.grad = None
        if copy is not None:
            copy.copy_(parameter.detach())
        return parameter.detach()

    return run


def _by_impl(t: Inputs, run: Callable[[Impl], Tensor]) -> dict[str, Run]:
    impls = (*t.impls, Impl.REFERENCE)
    return {impl.value: lambda impl=impl: run(impl) for impl in impls}


OPS: dict[str, Callable[[Inputs], dict[str, Run]]] = {
    "topk_encode": topk_encode_runs,
    "topk_encode fwd+bwd": topk_encode_backward_runs,
    "sparse_decode": sparse_decode_runs,
    "mse_l1_loss fwd": mse_forward_runs,
    "mse_l1_loss fwd+bwd": mse_l1_loss_runs,
    "pair_dots": pair_dots_runs,
    "group_by_latent": group_by_latent_runs,
    "segment_sum": segment_sum_runs,
    "aux_topk 5% dead fwd+bwd": aux_topk_runs,
    "row_adam": row_adam_runs,
    "row_adam from pairs": update_runs,
}
NO_RIVAL = ("mm",)
"""A part of the work: timed, with nothing to compare."""
BY_NORM = ("topk_encode fwd+bwd",)
"""Scores that were rounded to bf16 choose other latents near the k-th: norms are compared."""
