from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import PairGrad, RowGrad, SubsetGrad, emit, row_grads_of, sum_pairs
from fastsae_kernels._sddmm import pair_dots
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.decode.eager import gather_sum
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.topk.select import select_topk

# Below this many dead latents for each one kept, dense products over a compact copy of their rows
# take the place of gathers: an estimate from the cost of either at D = 576 on a CPU, not tuned.
DENSE_BELOW = 16


def aux_topk(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    latents = dead.nonzero().squeeze(1)
    if latents.numel() == 0 or x.numel() == 0:
        return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    sinks = row_grads_of(W_enc), row_grads_of(W_dec)
    loss = _AuxTopK.apply(
        x.detach().reshape(-1, x.shape[-1]),
        err.detach().reshape(-1, err.shape[-1]),
        latents,
        W_enc,
        b_enc,
        W_dec,
        b_pre,
        None if scale is None else scale.detach(),
        sinks,
    )
    assert isinstance(loss, Tensor)
    return loss


class _Dictionary(NamedTuple):
    """The dead latents' rows, compact."""

    W_enc: Tensor  # [n, D]
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, D_out]
    scale: Tensor | None  # [n]


class _Sums(NamedTuple):
    """The squared error summed over rows, and the gradients of half of it."""

    loss: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


class _AuxTopK(torch.autograd.Function):
    """The error is a constant, so the forward pass knows every gradient up to one factor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        err: Tensor,
        latents: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_pre: Tensor | None,
        scale: Tensor | None,
        sinks: tuple[list[RowGrad] | None, list[RowGrad] | None],
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x, err = x.to(wide), err.to(wide)
        centred = x if b_pre is None else x - b_pre.to(wide)
        rows = _Dictionary(
            W_enc.t().index_select(0, latents).to(wide),
            b_enc[latents].to(wide),
            W_dec.index_select(0, latents).to(wide),
            None if scale is None else scale[latents].to(wide),
        )
        half = max(1, x.shape[1] // 2)
        k_aux = min(half, len(latents))
        weight = min(len(latents) / half, 1) / len(x)
        run = _dense if len(latents) <= DENSE_BELOW * k_aux else _sparse
        sums = run(centred, err, rows, k_aux)
        ctx.save_for_backward(latents, rows.W_enc, *sums[1:])
        ctx.weight, ctx.sinks, ctx.d_sae = 2 * weight, sinks, len(W_dec)
        ctx.dtypes = W_enc.dtype, b_enc.dtype, W_dec.dtype, None if b_pre is None else b_pre.dtype
        return sums.loss * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        latents, rows_W_enc, d_enc, d_b, d_dec = ctx.saved_tensors
        needs_enc, needs_b, needs_dec, needs_pre = ctx.needs_input_grad[3:7]
        enc_dtype, b_dtype, dec_dtype, pre_dtype = ctx.dtypes
        factor = g * ctx.weight
        d_W_enc = d_W_dec = d_b_enc = d_b_pre = None
        if needs_enc:
            dense = emit(ctx.sinks[0], SubsetGrad(latents, d_enc * factor), ctx.d_sae)
            d_W_enc = None if dense is None else dense.t().to(enc_dtype)
        if needs_dec:
            dense = emit(ctx.sinks[1], SubsetGrad(latents, d_dec * factor), ctx.d_sae)
            d_W_dec = None if dense is None else dense.to(dec_dtype)
        if needs_b:
            d_b_enc = d_b.new_zeros(ctx.d_sae).index_copy(0, latents, d_b * factor).to(b_dtype)
        if needs_pre:
            d_b_pre = -(d_b * factor @ rows_W_enc).to(pre_dtype)
        return None, None, None, d_W_enc, d_b_enc, d_W_dec, d_b_pre, None, None


def _dense(x: Tensor, err: Tensor, rows: _Dictionary, k_aux: int) -> _Sums:
    """Row-chunked products with the compact rows; three [chunk, n] tensors at a time."""
    n = len(rows.b_enc)
    sums = _Sums(x.new_zeros(()), *(torch.zeros_like(t) for t in rows[:3]))
    chunk = max(1, workspace_bytes() // (4 * n * x.element_size()))
    for x_c, err_c in zip(x.split(chunk), err.split(chunk), strict=True):
        h = torch.addmm(rows.b_enc, x_c, rows.W_enc.t())  # [chunk, n]
        ranked = h if rows.scale is None else h * rows.scale
        picked = ranked.topk(k_aux, dim=1, sorted=False).indices
        acts = torch.zeros_like(h).scatter_(1, picked, h.gather(1, picked))
        error = torch.addmm(err_c, acts, rows.W_dec)
        sums.loss.add_(error.square().sum())
        sums.W_dec.addmm_(acts.t(), error)
        slopes = torch.mm(error, rows.W_dec.t(), out=h).gather(1, picked)
        d_h = acts.zero_().scatter_(1, picked, slopes)
        sums.W_enc.addmm_(d_h.t(), x_c)
        sums.b_enc.add_(d_h.sum(0))
    return sums


def _sparse(x: Tensor, err: Tensor, rows: _Dictionary, k_aux: int) -> _Sums:
    ranked, indices = select_topk(
        x, rows.W_enc.t(), rows.b_enc, k_aux, rows.scale, floor=-torch.inf
    )
    acts = ranked if rows.scale is None else ranked / rows.scale[indices.long()]
    error = gather_sum(indices, acts, rows.W_dec).add_(err)
    slopes = pair_dots(indices, error, rows.W_dec)
    groups, n = group_by_latent(acts, indices, len(rows.b_enc)), len(rows.b_enc)
    coef = slopes.reshape(-1)[groups.pairs]
    return _Sums(
        error.square().sum(),
        PairGrad(groups, coef, x).block(0, n),
        sum_pairs(groups, coef, len(x)),
        PairGrad(groups, acts.reshape(-1)[groups.pairs], error).block(0, n),
    )
