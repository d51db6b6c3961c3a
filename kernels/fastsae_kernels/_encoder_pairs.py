"""What every encode does around its selection: the rows of the product, and the gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._row_grads import RowGrad, emit_pairs, row_grads_of
from fastsae_kernels.code import LatentGroups
from fastsae_kernels.decode.ops import gather_sum
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_total, weighted_row_sum

# There a half-precision product is emulated, several times slower than fp32.
FP32_PRODUCT_DEVICES = ("cpu",)


class Encoder(NamedTuple):
    """What gradients may be wanted of."""

    x: Tensor
    """[B, D]."""
    W_enc: Tensor
    """[D, F]."""
    b_enc: Tensor
    """[F]."""
    b_pre: Tensor | None
    """[D]."""
    scale: Tensor | None
    """[F]."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Of the operands of a product with rows x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return wide if x.device.type in FP32_PRODUCT_DEVICES else x.dtype


def centred(x: Tensor, b_pre: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x - b_pre, subtracted in fp32 at least and rounded to `dtype`, in one pass."""
    if b_pre is None:
        return x.detach().to(dtype)
    shift = b_pre.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.sub(x.detach(), shift, out=x.new_empty(x.shape, dtype=dtype))


def with_gradients(
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    active: Tensor,
    encoder: Encoder,
    W_compute: Tensor | None,
    rows: Tensor,
    impl: Impl,
) -> tuple[Tensor, LatentGroups | None]:
    """The same acts with gradients to what the encoder learns, and the pairs by latent.

    Of a flattened code: `indices` and `acts` are [B, K], or [nnz] with `row_offsets` [B + 1].
    `active`, of the same shape, is non-zero at the pairs of the groups, those with a gradient: the
    acts of the others are 0 or their gradient comes in as 0. `rows` are those that the product
    read, and `W_compute` its copy of W_enc, if it read one: rounded where it was, they make the
    gradient of what was computed, in half the bytes.
    """
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in encoder)):
        return acts, None
    groups = group_by_latent(row_offsets, indices, active, encoder.W_enc.shape[1])
    sink = row_grads_of(encoder.W_enc)
    learned = _Pairs.apply(
        *encoder, W_compute, rows, row_offsets, indices, acts, impl, sink, *groups
    )
    assert isinstance(learned, Tensor)
    return learned, groups


class _Pairs(torch.autograd.Function):
    """The values of pairs that were selected already; backward is a sum over the active ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_pre: Tensor | None,
        scale: Tensor | None,
        W_compute: Tensor | None,
        rows: Tensor,
        row_offsets: Tensor | None,
        indices: Tensor,
        values: Tensor,
        impl: Impl,
        sink: list[RowGrad] | None,
        *groups: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, W_enc, scale, W_compute, row_offsets, indices, values, *groups)
        ctx.impl, ctx.sink = impl, sink
        ctx.dtypes = x.dtype, b_enc.dtype, None if b_pre is None else b_pre.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, W_enc, scale, W_compute, row_offsets, indices, values, *made = ctx.saved_tensors
        groups, impl = LatentGroups(*made), ctx.impl
        x_dtype, b_dtype, b_pre_dtype = ctx.dtypes
        needs_x, needs_W, needs_b, needs_pre, needs_scale = ctx.needs_input_grad[:5]
        d_pre = torch.where(values != 0, g, 0)
        d_x = d_W = d_b = d_b_pre = d_scale = None
        if scale is not None:
            picked = scale.to(d_pre.dtype)[indices.long()]
            if needs_scale:
                per_pair = torch.where(picked != 0, d_pre * values / picked, 0)
                d_scale = segment_total(groups, per_pair.reshape(-1)[groups.pairs], impl)
                d_scale = d_scale.to(scale.dtype)
            d_pre = d_pre * picked
        coef = d_pre.reshape(-1)[groups.pairs]
        weight = W_enc if W_compute is None else W_compute
        if needs_x:
            d_x = gather_sum(row_offsets, indices, d_pre, weight.t().contiguous(), impl).to(x_dtype)
        if needs_W:
            d_W = emit_pairs(ctx.sink, groups, coef, rows, impl)
            d_W = None if d_W is None else d_W.t().to(W_enc.dtype)
        if needs_b or needs_pre:
            total = segment_total(groups, coef, impl)
            if needs_pre:
                # Summing over the rows first turns a [B, D] gather into one matrix-vector product.
                d_b_pre = -weighted_row_sum(weight.t(), total, impl).to(b_pre_dtype)
            d_b = total.to(b_dtype) if needs_b else None
        return d_x, d_W, d_b, d_b_pre, d_scale, *(None,) * (7 + len(made))
