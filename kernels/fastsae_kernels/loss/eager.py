from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import PairGrad, RowGrad, emit, row_grads_of, sum_pairs
from fastsae_kernels._sddmm import pair_dots
from fastsae_kernels.code import LatentGroups, SparseCode
from fastsae_kernels.decode.eager import gather_sum
from fastsae_kernels.grouping.eager import group_by_latent


def mse_l1_loss(
    x: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor, l1_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n_slots, d_out = code.indices.shape[-1], W_dec.shape[1]
    mse, l1, err = _MSEL1Loss.apply(
        x.detach().reshape(-1, d_out),
        code.acts.reshape(-1, n_slots),
        code.indices.reshape(-1, n_slots),
        W_dec,
        b_dec,
        l1_weight,
        code.groups,
        row_grads_of(W_dec),
    )
    return mse, l1, err.reshape(x.shape)


class _MSEL1Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        acts: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_weight: Tensor | None,
        groups: LatentGroups | None,
        sink: list[RowGrad] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = W_dec.to(acts.dtype)
        err = gather_sum(indices, acts, weight).add_(b_dec).sub_(x)
        mse = torch.linalg.vector_norm(err, dtype=err.dtype).square() / len(x)
        picked = None if l1_weight is None else l1_weight.to(acts.dtype)[indices.long()]
        l1 = (acts.abs() if picked is None else acts.abs() * picked).sum() / len(x)
        if any(ctx.needs_input_grad):
            dots = pair_dots(indices, err, weight) if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(acts, indices, dots, err, picked, *(groups or ()))
            ctx.d_sae, ctx.sink = len(W_dec), sink
            ctx.dtypes = W_dec.dtype, b_dec.dtype, None if l1_weight is None else l1_weight.dtype
        ctx.mark_non_differentiable(err)
        return mse, l1, err

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_mse: Tensor, g_l1: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, dots, err, picked, *groups = ctx.saved_tensors
        needs_acts, _, needs_W, needs_b, needs_weight = ctx.needs_input_grad[1:6]
        W_dtype, b_dtype, weight_dtype = ctx.dtypes
        n_rows = len(err)
        per_row, per_act = g_mse * (2 / n_rows), g_l1 / n_rows
        d_acts = d_W = d_b = d_weight = None
        if needs_acts:
            l1_slope = acts.sign() if picked is None else acts.sign() * picked
            d_acts = dots * per_row + l1_slope * per_act
        if needs_W or needs_weight:
            made = LatentGroups(*groups) if groups else group_by_latent(acts, indices, ctx.d_sae)
            by_latent = acts.reshape(-1)[made.pairs]
            if needs_W:
                dense = emit(ctx.sink, PairGrad(made, by_latent * per_row, err), ctx.d_sae)
                d_W = None if dense is None else dense.to(W_dtype)
            if needs_weight:
                d_weight = sum_pairs(made, by_latent.abs() * per_act, n_rows).to(weight_dtype)
        if needs_b:
            d_b = (err.sum(0) * per_row).to(b_dtype)
        return None, d_acts, None, d_W, d_b, d_weight, None, None
