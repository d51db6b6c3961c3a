from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import PairGrad, RowGrad, emit, row_grads_of, sum_pairs
from fastsae_kernels.code import LatentGroups, SparseCode
from fastsae_kernels.decode.eager import gather_sum
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.topk.select import select_topk

# There a half-precision product is emulated, several times slower than fp32.
FP32_PRODUCT_DEVICES = ("cpu",)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_pre: Tensor | None, scale: Tensor | None
) -> SparseCode:
    flat = x.reshape(-1, x.shape[-1])
    learned = (x, W_enc, b_enc, b_pre, scale)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    outputs = _TopKEncode.apply(flat, *learned[1:], k, learns, row_grads_of(W_enc))
    acts, indices, *groups = outputs
    shape = (*x.shape[:-1], k)
    made = LatentGroups(*groups) if groups else None
    return SparseCode(acts.reshape(shape), indices.reshape(shape), made)


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_pre: Tensor | None,
        scale: Tensor | None,
        k: int,
        learns: bool,
        sink: list[RowGrad] | None,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
        rows = centred if x.device.type in FP32_PRODUCT_DEVICES else centred.to(x.dtype)
        acts, indices = select_topk(rows, W_enc, b_enc, k, scale)
        if not learns:
            ctx.mark_non_differentiable(indices)
            return acts, indices
        groups = group_by_latent(acts, indices, W_enc.shape[1])
        ctx.mark_non_differentiable(indices, *groups)
        ctx.save_for_backward(centred, W_enc, b_enc, scale, acts, indices, *groups)
        ctx.x_dtype, ctx.sink = x.dtype, sink
        ctx.b_pre_dtype = None if b_pre is None else b_pre.dtype
        return acts, indices, *groups

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, W_enc, b_enc, scale, acts, indices, *groups = ctx.saved_tensors
        groups = LatentGroups(*groups)
        d_sae = W_enc.shape[1]
        d_pre = torch.where(acts != 0, g, 0)
        d_scale = None
        if scale is not None:
            picked = scale.to(d_pre.dtype)[indices.long()]
            if ctx.needs_input_grad[4]:
                per_pair = torch.where(picked != 0, d_pre * acts / picked, 0)
                d_scale = sum_pairs(groups, _by_latent(per_pair, groups), len(acts)).to(scale.dtype)
            d_pre = d_pre * picked
        coef = _by_latent(d_pre, groups)
        needs_x, needs_W, needs_b, needs_pre = ctx.needs_input_grad[:4]
        d_x = d_W = d_b_pre = None
        if needs_x:
            rows = W_enc.t().to(d_pre.dtype).contiguous()
            d_x = gather_sum(indices, d_pre, rows).to(ctx.x_dtype)
        if needs_W:
            dense = emit(ctx.sink, PairGrad(groups, coef, centred), d_sae)
            d_W = None if dense is None else dense.t().to(W_enc.dtype)
        d_b = sum_pairs(groups, coef, len(acts)) if needs_b or needs_pre else None
        if d_b is not None and needs_pre:
            # Summing over the rows first turns a [B, D] gather into one matrix-vector product.
            d_b_pre = -(W_enc.to(d_b.dtype) @ d_b).to(ctx.b_pre_dtype)
        return (
            d_x,
            d_W,
            d_b.to(b_enc.dtype) if d_b is not None and needs_b else None,
            *((d_b_pre, d_scale, None, None, None)),
        )


def _by_latent(per_pair: Tensor, groups: LatentGroups) -> Tensor:
    return per_pair.reshape(-1)[groups.pairs]
