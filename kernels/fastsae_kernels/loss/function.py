from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._row_grads import RowGrad, emit_pairs, row_grads_of
from fastsae_kernels.code import LatentGroups, RaggedCode, SparseCode, entry_rows, flattened
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_total
from fastsae_kernels.loss.ops import mse_l1_rows
from fastsae_kernels.shards import Shards


def mse_l1_loss(
    x: Tensor,
    code: SparseCode | RaggedCode,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    row_weight: Tensor | None,
    W_compute: Tensor | None,
    shards: Shards | None,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor]:
    row_offsets, indices, acts = flattened(code)
    rows = W_dec.flatten(1)
    targets = x.detach().reshape(-1, rows.shape[1])
    if row_weight is not None:
        # A row of weight 0 is left out whatever it holds: 0 times NaN would still be NaN.
        row_weight = row_weight.reshape(-1)
        kept = row_weight != 0
        targets = targets.masked_fill(~kept[:, None], 0)
        acts = torch.where(kept[entry_rows(row_offsets, indices).long()], acts, 0)
    mse, l1, err = _MSEL1Loss.apply(
        acts,
        rows,
        b_dec.flatten(),
        l1_weight,
        targets,
        row_offsets,
        indices,
        row_weight,
        None if W_compute is None else W_compute.detach().flatten(1),
        shards,
        impl,
        row_grads_of(W_dec),
        *(code.groups or ()),
    )
    return mse, l1, err.reshape(x.shape)


class _MSEL1Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_weight: Tensor | None,
        x: Tensor,
        row_offsets: Tensor | None,
        indices: Tensor,
        row_weight: Tensor | None,
        W_compute: Tensor | None,
        shards: Shards | None,
        impl: Impl,
        sink: list[RowGrad] | None,
        *groups: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_mse, row_l1, err, dots = mse_l1_rows(
            x,
            row_offsets,
            indices,
            acts,
            W_dec if W_compute is None else W_compute,
            b_dec,
            l1_weight,
            ctx.needs_input_grad[0],
            impl,
            shards,
        )
        share = None  # of each row in the mean
        if row_weight is None:
            mse, l1 = row_mse.sum() / len(x), row_l1.sum() / len(x)
        else:
            share = row_weight.to(err.dtype) / row_weight.to(err.dtype).sum()
            mse, l1 = torch.dot(row_mse, share), torch.dot(row_l1, share)
        _, needs_W, needs_b = ctx.needs_input_grad[:3]
        operand = err if needs_W else None
        if needs_W and W_compute is not None and W_compute.dtype.itemsize == 2:
            # As the gradient of a half-precision product reads it: half the bytes of each gather.
            operand = err.to(W_compute.dtype)
        mean_err = None
        if needs_b:
            mean_err = err.mean(0) if share is None else share @ err
        ctx.save_for_backward(
            acts, dots, operand, mean_err, l1_weight, row_offsets, indices, share, *groups
        )
        ctx.n_rows, ctx.d_sae, ctx.impl, ctx.sink = len(x), len(W_dec), impl, sink
        ctx.dtypes = W_dec.dtype, b_dec.dtype
        ctx.mark_non_differentiable(err)
        ctx.set_materialize_grads(False)  # a [B, D] of zeros, for err
        return mse, l1, err

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_mse: Tensor | None, g_l1: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        acts, dots, operand, mean_err, l1_weight, *saved = ctx.saved_tensors
        row_offsets, indices, share, *groups = saved
        needs_acts, needs_W, needs_b, needs_weight = ctx.needs_input_grad[:4]
        W_dtype, b_dtype = ctx.dtypes
        zero: Tensor = acts.new_zeros(())
        g_mse = zero if g_mse is None else g_mse
        g_l1 = zero if g_l1 is None else g_l1
        # Of each entry, or of all of them, in the mean over rows.
        shares = 1 / ctx.n_rows if share is None else share[entry_rows(row_offsets, indices).long()]
        per_mse, per_l1 = 2 * shares * g_mse, shares * g_l1
        d_acts = d_W = d_b = d_weight = None
        if needs_acts:
            slope = acts.sign()
            if l1_weight is not None:
                slope = slope * l1_weight.to(acts.dtype)[indices.long()]
            d_acts = dots * per_mse + slope * per_l1
        if needs_W or needs_weight:
            made = (
                LatentGroups(*groups)
                if groups
                else group_by_latent(row_offsets, indices, acts, ctx.d_sae)
            )
            if needs_W:
                coef = (acts * per_mse).reshape(-1)[made.pairs]
                d_W = emit_pairs(ctx.sink, made, coef, operand, ctx.impl)
                d_W = None if d_W is None else d_W.to(W_dtype)
            if l1_weight is not None and needs_weight:
                coef = (acts.abs() * per_l1).reshape(-1)[made.pairs]
                d_weight = segment_total(made, coef, ctx.impl).to(l1_weight.dtype)
        if needs_b:
            d_b = (mean_err * (2 * g_mse)).to(b_dtype)
        return d_acts, d_W, d_b, d_weight, *(None,) * (8 + len(groups))
