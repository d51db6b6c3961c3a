from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import Encoder, centred, product_dtype, with_gradients
from fastsae_kernels._row_grads import RowGrad, emit_dense, row_grads_of
from fastsae_kernels.code import RaggedCode, entry_rows
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_total
from fastsae_kernels.threshold.ops import relu_l1_sums, select_above


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    W_compute: Tensor | None,
    impl: Impl,
) -> RaggedCode:
    encoder = Encoder(x, W_enc, b_enc, b_pre, scale)
    with torch.no_grad():
        rows = centred(x, b_pre, product_dtype(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(threshold, Tensor):
            limit = threshold.to(wide).expand(len(b_enc)).contiguous()
        else:
            limit = torch.full_like(b_enc, threshold, dtype=wide)
        weight = W_enc if W_compute is None else W_compute
        found = select_above(rows, weight, b_enc, scale, limit, impl)
    row_offsets, indices, acts = found
    acts, groups = with_gradients(*found, acts, encoder, W_compute, rows, impl)
    return RaggedCode(row_offsets, indices, acts, groups)


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    b_pre: Tensor | None,
    W_compute: Tensor | None,
    impl: Impl,
) -> tuple[RaggedCode, Tensor]:
    encoder = Encoder(x, W_enc, b_enc, b_pre, None)
    with torch.no_grad():
        rows = centred(x, b_pre, product_dtype(x))
        theta = threshold.to(torch.promote_types(x.dtype, torch.float32))
        weight = W_enc if W_compute is None else W_compute
        band = select_above(rows, weight, b_enc, None, theta - bandwidth / 2, impl)
        row_offsets, indices, pre_acts = band
        # "Not at or below" rather than "above": NaN passes and stays visible.
        above = (pre_acts <= theta.index_select(0, indices)).logical_not_()
    pre_acts, groups = with_gradients(*band, above, encoder, W_compute, rows, impl)
    acts, l0 = _JumpReLU.apply(pre_acts, threshold, above, row_offsets, indices, bandwidth, impl)
    return RaggedCode(row_offsets, indices, acts, groups), l0


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Tensor,
        threshold: Tensor,
        above: Tensor,
        row_offsets: Tensor,
        indices: Tensor,
        bandwidth: float,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre_acts, threshold, above, row_offsets, indices)
        ctx.bandwidth, ctx.impl = bandwidth, impl
        before = torch.cat([above.new_zeros(1), above]).cumsum(0)
        l0 = before.index_select(0, row_offsets).diff().to(pre_acts.dtype)
        return torch.where(above, pre_acts, 0), l0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_l0: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold, above, row_offsets, indices = ctx.saved_tensors
        d_pre = torch.where(above, g, 0) if ctx.needs_input_grad[0] else None
        d_threshold = None
        if ctx.needs_input_grad[1]:
            theta = threshold.to(pre_acts.dtype).index_select(0, indices)
            gap = (pre_acts - theta) / ctx.bandwidth
            in_band = (gap > -0.5) & (gap < 0.5)
            per_row = g_l0.index_select(0, entry_rows(row_offsets, indices))
            slope = torch.where(in_band, (theta * g + per_row) / -ctx.bandwidth, 0)
            groups = group_by_latent(row_offsets, indices, slope, len(threshold))
            d_threshold = segment_total(groups, slope[groups.pairs], ctx.impl).to(threshold.dtype)
        return d_pre, d_threshold, *(None,) * 5


def relu_l1_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    lp_norm: float,
    b_pre: Tensor | None,
) -> tuple[Tensor, ...]:
    # A view: b_pre is usually b_dec, and torch.compile takes no tensor twice.
    learned = (W_enc, b_enc, W_dec, b_dec, None if b_pre is None else b_pre.view_as(b_pre))
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    with torch.no_grad():
        flat = x.reshape(-1, x.shape[-1])
        mse, l1, err, counts, *grads = relu_l1_sums(
            flat, W_enc, b_enc, W_dec, b_dec, b_pre, l1_coefficient, lp_norm, learns
        )
        total = mse + l1_coefficient * l1
    if learns:
        sinks = row_grads_of(W_enc), row_grads_of(W_dec)
        total = _ReLUL1Loss.apply(*learned, total, err, *grads, *sinks)
        assert isinstance(total, Tensor)
    return total, mse, l1, err.reshape(x.shape), counts


class _ReLUL1Loss(torch.autograd.Function):
    """Every gradient is known up to one factor with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        b_pre: Tensor | None,
        total: Tensor,
        err: Tensor,
        d_enc: Tensor,
        d_b_enc: Tensor,
        d_dec: Tensor,
        enc_sink: list[RowGrad] | None,
        dec_sink: list[RowGrad] | None,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, err, d_enc, d_b_enc, d_dec)
        ctx.sinks = enc_sink, dec_sink
        ctx.dtypes = [None if t is None else t.dtype for t in (W_enc, b_enc, W_dec, b_dec, b_pre)]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, err, d_enc, d_b_enc, d_dec = ctx.saved_tensors
        enc_dtype, b_enc_dtype, dec_dtype, b_dec_dtype, b_pre_dtype = ctx.dtypes
        needs_enc, needs_b_enc, needs_dec, needs_b_dec, needs_pre = ctx.needs_input_grad[:5]
        d_W_enc = d_W_dec = d_b_pre = None
        if needs_enc:
            dense = emit_dense(ctx.sinks[0], d_enc * g)
            d_W_enc = None if dense is None else dense.t().to(enc_dtype)
        if needs_dec:
            dense = emit_dense(ctx.sinks[1], d_dec * g)
            d_W_dec = None if dense is None else dense.to(dec_dtype)
        d_b = d_b_enc * g
        if needs_pre:
            d_b_pre = -(W_enc.to(d_b.dtype) @ d_b).to(b_pre_dtype)
        d_b_enc = d_b.to(b_enc_dtype) if needs_b_enc else None
        d_b_dec = (err.sum(0) * (2 / len(err)) * g).to(b_dec_dtype) if needs_b_dec else None
        return d_W_enc, d_b_enc, d_W_dec, d_b_dec, d_b_pre, *(None,) * 7
