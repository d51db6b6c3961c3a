from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import PairGrad, RowGrad, emit, row_grads_of
from fastsae_kernels._sddmm import pair_dots
from fastsae_kernels.code import LatentGroups, RaggedCode, SparseCode
from fastsae_kernels.grouping.eager import group_by_latent


def gather_sum(indices: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
    """[B, D]: sum_k acts[b, k] weight[indices[b, k]]; `embedding_bag` is twice as fast in int32."""
    return F.embedding_bag(indices.int(), weight, per_sample_weights=acts, mode="sum")


def ragged_decode(code: RaggedCode, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    with torch.no_grad():
        wide = torch.promote_types(code.acts.dtype, W_dec.dtype)
        x_hat = F.embedding_bag(
            code.indices,
            W_dec.to(wide),
            code.row_offsets,
            per_sample_weights=code.acts.to(wide),
            mode="sum",
            include_last_offset=True,
        )
        return x_hat if b_dec is None else x_hat + b_dec


def sparse_decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    wide = torch.promote_types(code.acts.dtype, W_dec.dtype)
    n_slots = code.indices.shape[-1]
    x_hat = _SparseDecode.apply(
        code.acts.reshape(-1, n_slots).to(wide),
        code.indices.reshape(-1, n_slots),
        W_dec.to(wide),
        code.groups,
        row_grads_of(W_dec),
    )
    assert isinstance(x_hat, Tensor)
    x_hat = x_hat.reshape(*code.acts.shape[:-1], W_dec.shape[1])
    return x_hat if b_dec is None else x_hat + b_dec


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        groups: LatentGroups | None,
        sink: list[RowGrad] | None,
    ) -> Tensor:
        ctx.save_for_backward(acts, indices, W_dec)
        ctx.groups, ctx.sink = groups, sink
        return gather_sum(indices, acts, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, W_dec = ctx.saved_tensors
        g = g.contiguous()
        d_acts = pair_dots(indices, g, W_dec) if ctx.needs_input_grad[0] else None
        d_W_dec = None
        if ctx.needs_input_grad[2]:
            groups = ctx.groups or group_by_latent(acts, indices, W_dec.shape[0])
            coef = acts.reshape(-1)[groups.pairs]
            d_W_dec = emit(ctx.sink, PairGrad(groups, coef, g), W_dec.shape[0])
        return d_acts, None, d_W_dec, None, None
