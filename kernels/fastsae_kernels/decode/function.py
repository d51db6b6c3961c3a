from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._row_grads import RowGrad, emit_pairs, row_grads_of
from fastsae_kernels.code import LatentGroups, RaggedCode, SparseCode, flattened
from fastsae_kernels.decode.ops import gather_sum, pair_dots
from fastsae_kernels.grouping.eager import group_by_latent


def sparse_decode(
    code: SparseCode | RaggedCode, W_dec: Tensor, b_dec: Tensor | None, impl: Impl
) -> Tensor:
    wide = torch.promote_types(code.acts.dtype, W_dec.dtype)
    row_offsets, indices, acts = flattened(code)
    x_hat = _SparseDecode.apply(
        acts.to(wide),
        W_dec.flatten(1),
        row_offsets,
        indices,
        impl,
        row_grads_of(W_dec),
        *(code.groups or ()),
    )
    assert isinstance(x_hat, Tensor)
    lead = code.acts.shape[:-1] if isinstance(code, SparseCode) else x_hat.shape[:1]
    x_hat = x_hat.reshape(*lead, *W_dec.shape[1:])
    return (x_hat if b_dec is None else x_hat + b_dec).to(wide)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        W_dec: Tensor,
        row_offsets: Tensor | None,
        indices: Tensor,
        impl: Impl,
        sink: list[RowGrad] | None,
        *groups: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(acts, W_dec, row_offsets, indices, *groups)
        ctx.impl, ctx.sink = impl, sink
        return gather_sum(row_offsets, indices, acts, W_dec, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec, row_offsets, indices, *groups = ctx.saved_tensors
        g = g.contiguous()
        d_acts = d_W_dec = None
        if ctx.needs_input_grad[0]:
            d_acts = pair_dots(row_offsets, indices, g, W_dec, ctx.impl).to(acts.dtype)
        if ctx.needs_input_grad[1]:
            made = (
                LatentGroups(*groups)
                if groups
                else group_by_latent(row_offsets, indices, acts, len(W_dec))
            )
            coef = acts.reshape(-1)[made.pairs]
            d_W_dec = emit_pairs(ctx.sink, made, coef, g, ctx.impl)
        return d_acts, d_W_dec, *(None,) * (4 + len(groups))
