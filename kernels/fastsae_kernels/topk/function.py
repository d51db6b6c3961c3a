from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._row_grads import RowGrad, emit_pairs, row_grads_of
from fastsae_kernels.code import LatentGroups, SparseCode
from fastsae_kernels.decode.ops import gather_sum
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_total
from fastsae_kernels.topk.ops import select_topk

# There a half-precision product is emulated, several times slower than fp32.
FP32_PRODUCT_DEVICES = ("cpu",)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_pre: Tensor | None,
    scale: Tensor | None,
    W_compute: Tensor | None,
    impl: Impl,
) -> SparseCode:
    flat = x.reshape(-1, x.shape[-1])
    learned = (x, W_enc, b_enc, b_pre, scale)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    W_compute = None if W_compute is None else W_compute.detach()
    outputs = _TopKEncode.apply(flat, *learned[1:], W_compute, k, learns, impl, row_grads_of(W_enc))
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
        W_compute: Tensor | None,
        k: int,
        learns: bool,
        impl: Impl,
        sink: list[RowGrad] | None,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
        rows = centred if x.device.type in FP32_PRODUCT_DEVICES else centred.to(x.dtype)
        weight = W_enc if W_compute is None else W_compute
        acts, indices = select_topk(rows, weight, b_enc, k, scale, signed=False, impl=impl)
        if not learns:
            ctx.mark_non_differentiable(indices)
            return acts, indices
        groups = group_by_latent(None, indices, acts, W_enc.shape[1])
        ctx.mark_non_differentiable(indices, *groups)
        ctx.save_for_backward(centred, W_enc, b_enc, scale, acts, indices, *groups)
        ctx.x_dtype, ctx.impl, ctx.sink = x.dtype, impl, sink
        ctx.b_pre_dtype = None if b_pre is None else b_pre.dtype
        return acts, indices, *groups

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, W_enc, b_enc, scale, acts, indices, *groups = ctx.saved_tensors
        groups, impl = LatentGroups(*groups), ctx.impl
        needs_x, needs_W, needs_b, needs_pre, needs_scale = ctx.needs_input_grad[:5]
        d_pre = torch.where(acts != 0, g, 0)
        d_x = d_W = d_b = d_b_pre = d_scale = None
        if scale is not None:
            picked = scale.to(d_pre.dtype)[indices.long()]
            if needs_scale:
                per_pair = torch.where(picked != 0, d_pre * acts / picked, 0)
                d_scale = segment_total(groups, _by_latent(per_pair, groups), impl)
                d_scale = d_scale.to(scale.dtype)
            d_pre = d_pre * picked
        coef = _by_latent(d_pre, groups)
        if needs_x:
            d_x = gather_sum(None, indices, d_pre, W_enc.t().contiguous(), impl).to(ctx.x_dtype)
        if needs_W:
            d_W = emit_pairs(ctx.sink, groups, coef, centred, impl)
            d_W = None if d_W is None else d_W.t().to(W_enc.dtype)
        if needs_b or needs_pre:
            total = segment_total(groups, coef, impl)
            if needs_pre:
                # Summing over the rows first turns a [B, D] gather into one matrix-vector product.
                d_b_pre = -(W_enc.to(total.dtype) @ total).to(ctx.b_pre_dtype)
            d_b = total.to(b_enc.dtype) if needs_b else None
        return d_x, d_W, d_b, d_b_pre, d_scale, *(None,) * 5


def _by_latent(per_pair: Tensor, groups: LatentGroups) -> Tensor:
    return per_pair.reshape(-1)[groups.pairs]
