from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._row_grads import RowGrad, emit_rows, row_grads_of
from fastsae_kernels.auxk.eager import aux_topk_sums as sums_of_shard
from fastsae_kernels.auxk.ops import aux_topk_sums
from fastsae_kernels.shards import Shards


def aux_topk(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    shards: Shards | None,
    impl: Impl,
) -> Tensor:
    if shards is None and not torch.compiler.is_compiling() and not bool(dead.any()):
        # No graph: an empty gradient would cost a pass over the whole dictionary.
        return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    x, err = x.detach().reshape(-1, x.shape[-1]), err.detach().reshape(-1, err.shape[-1])
    # Outside the Function: its number of latents is only known here, which torch.compile must see.
    with torch.no_grad():
        arguments = (x, err, dead, W_enc, b_enc, W_dec, b_pre, scale, absolute, impl)
        sums = aux_topk_sums(*arguments) if shards is None else sums_of_shard(*arguments, shards)
    sinks = row_grads_of(W_enc), row_grads_of(W_dec)
    loss = _AuxTopK.apply(W_enc, b_enc, W_dec, b_pre, *sums, *sinks)
    assert isinstance(loss, Tensor)
    return loss


class _AuxTopK(torch.autograd.Function):
    """The error is a constant, so every gradient is known up to one factor with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_pre: Tensor | None,
        loss: Tensor,
        latents: Tensor,
        d_enc: Tensor,
        d_b_enc: Tensor,
        d_dec: Tensor,
        enc_sink: list[RowGrad] | None,
        dec_sink: list[RowGrad] | None,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, latents, d_enc, d_b_enc, d_dec)
        ctx.sinks, ctx.d_sae = (enc_sink, dec_sink), len(W_dec)
        ctx.dtypes = W_enc.dtype, b_enc.dtype, W_dec.dtype, None if b_pre is None else b_pre.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, latents, d_enc, d_b, d_dec = ctx.saved_tensors
        needs_enc, needs_b, needs_dec, needs_pre = ctx.needs_input_grad[:4]
        enc_dtype, b_dtype, dec_dtype, pre_dtype = ctx.dtypes
        d_W_enc = d_b_enc = d_W_dec = d_b_pre = None
        if needs_enc:
            d_W_enc = emit_rows(ctx.sinks[0], latents, d_enc * g, ctx.d_sae)
            d_W_enc = None if d_W_enc is None else d_W_enc.t().to(enc_dtype)
        if needs_dec:
            d_W_dec = emit_rows(ctx.sinks[1], latents, d_dec * g, ctx.d_sae)
            d_W_dec = None if d_W_dec is None else d_W_dec.to(dec_dtype)
        if needs_b or needs_pre:
            d_b = d_b.new_zeros(ctx.d_sae).index_copy_(0, latents, d_b * g)
            if needs_pre:
                d_b_pre = -(W_enc.to(d_b.dtype) @ d_b).to(pre_dtype)
            d_b_enc = d_b.to(b_dtype) if needs_b else None
        return d_W_enc, d_b_enc, d_W_dec, d_b_pre, *(None,) * 7
