"""Grouping by latent, sums over the groups, and the row optimizers."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.rivals.inputs import Inputs, Run, by_impl
from fastsae_kernels import (
    DenseGrad,
    Impl,
    RowGrad,
    group_by_latent,
    lazy_row_adam,
    row_adam,
)
from fastsae_kernels._row_grads import PairGrad
from fastsae_kernels.grouping.ops import segment_sum

LR, EPS = 0.1, 1e-3
"""A step as large as the weights, that no update or a wrong sign is seen; and an eps by which a
gradient that is nothing but rounding does not decide a sign."""


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

    ours = by_impl(t.impls, lambda impl: segment_sum(groups, coef, operand, impl))
    return {**ours, "index_add_": scattered}


def row_adam_runs(t: Inputs) -> dict[str, Run]:
    """An update by a gradient that is there."""
    shape = (t.case.F, t.case.D)
    generator = torch.Generator(t.device).manual_seed(2)
    weight, g = (torch.randn(shape, device=t.device, generator=generator) for _ in range(2))
    runs = {i.value: _row_adam_run(row_adam, weight, [DenseGrad(g)], i) for i in t.impls}
    return {**runs, "torch.optim.Adam(fused)": _fused_adam_run(weight, lambda: g)}


def update_runs(t: Inputs) -> dict[str, Run]:
    """From the pairs of a step to new weights and the copy that the next step reads."""
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    weight, copy = t.W_dec.detach(), torch.empty_like(t.half, dtype=torch.bfloat16)
    grads = [PairGrad(groups, coef, operand)]
    runs = {i.value: _row_adam_run(row_adam, weight, grads, i, copy) for i in t.impls}
    summed = lambda: segment_sum(groups, coef, operand, t.impls[0])
    return {**runs, "segment_sum, Adam(fused), copy": _fused_adam_run(weight, summed, copy)}


def lazy_update_runs(t: Inputs) -> dict[str, Run]:
    """From the pairs of a step to the rows that they touch."""
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    weight, grads = t.W_dec.detach(), [PairGrad(groups, coef, operand)]
    latents = code.indices.reshape(1, -1).long()
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([parameter], lr=LR, eps=EPS)

    def sparse() -> Tensor:
        terms = (operand.unsqueeze(1) * code.acts.unsqueeze(2)).flatten(0, 1)
        parameter.grad = torch.sparse_coo_tensor(
            latents, terms, weight.shape, check_invariants=False
        ).coalesce()
        optimizer.step()
        parameter.grad = None
        return parameter.detach()

    runs = {i.value: _row_adam_run(lazy_row_adam, weight, grads, i) for i in t.impls}
    return {**runs, "torch.optim.SparseAdam": sparse}


def _row_adam_run(
    update: Callable[..., None],
    weight: Tensor,
    grads: Sequence[RowGrad],
    impl: Impl,
    copy: Tensor | None = None,
) -> Run:
    mine, moments = weight.clone(), (torch.zeros_like(weight), torch.zeros_like(weight))
    steps = itertools.count(1)

    def run() -> Tensor:
        update(mine, grads, *moments, step=next(steps), lr=LR, eps=EPS, copy=copy, impl=impl)
        return mine

    return run


def _fused_adam_run(
    weight: Tensor, gradient: Callable[[], Tensor], copy: Tensor | None = None
) -> Run:
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=LR, eps=EPS, fused=True)

    def run() -> Tensor:
        parameter.grad = gradient()
        optimizer.step()
        parameter.grad = None
        if copy is not None:
            copy.copy_(parameter.detach())
        return parameter.detach()

    return run
