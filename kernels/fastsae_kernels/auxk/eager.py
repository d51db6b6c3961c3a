from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import centred, product_dtype
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.decode.ops import gather_sum, pair_dots
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_sum, segment_total
from fastsae_kernels.topk.ops import select_topk

# Below this many dead latents for each one kept, dense products over a compact copy of their rows
# take the place of gathers: estimates, not tuned. The kernels have no other path below 64.
DENSE_BELOW = {Impl.EAGER: 16, Impl.TRITON: 64}


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


def aux_topk_sums(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    shifted = centred(x, b_pre, wide)
    err = err.to(wide)
    latents = dead.nonzero().squeeze(1)
    rows = _Dictionary(
        W_enc.t().index_select(0, latents).to(wide),
        b_enc[latents].to(wide),
        W_dec.index_select(0, latents).to(wide),
        None if scale is None else scale[latents].to(wide),
    )
    half = max(1, x.shape[1] // 2)
    k_aux = min(half, len(latents))
    if k_aux == 0 or len(x) == 0:
        d_enc, d_b_enc, d_dec = (torch.zeros_like(t) for t in rows[:3])
        return shifted.new_zeros(()), latents, d_enc, d_b_enc, d_dec
    weight = min(len(latents) / half, 1) / len(x)
    if absolute or len(latents) <= DENSE_BELOW[impl] * k_aux:
        sums = _dense(shifted, err, rows, k_aux, absolute)
    else:
        sums = _sparse(shifted, shifted.to(product_dtype(x)), err, rows, k_aux, impl)
    d_enc, d_b_enc, d_dec = (grad.mul_(2 * weight) for grad in sums[1:])
    return sums.loss * weight, latents, d_enc, d_b_enc, d_dec


def _dense(x: Tensor, err: Tensor, rows: _Dictionary, k_aux: int, absolute: bool) -> _Sums:
    """Row-chunked products with the compact rows; three [chunk, n] tensors at a time."""
    n = len(rows.b_enc)
    sums = _Sums(x.new_zeros(()), *(torch.zeros_like(t) for t in rows[:3]))
    chunk = max(1, workspace_bytes() // (4 * n * x.element_size()))
    for x_c, err_c in zip(x.split(chunk), err.split(chunk), strict=True):
        h = torch.addmm(rows.b_enc, x_c, rows.W_enc.t())  # [chunk, n]
        ranked = h if rows.scale is None else h * rows.scale
        ranked = ranked.abs() if absolute else ranked
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


def _sparse(
    x: Tensor, scored: Tensor, err: Tensor, rows: _Dictionary, k_aux: int, impl: Impl
) -> _Sums:
    """`scored` are the rows in the dtype of the product that ranks the latents."""
    acts, indices = select_topk(
        scored, rows.W_enc.t(), rows.b_enc, k_aux, rows.scale, signed=True, impl=impl
    )
    if rows.scale is not None:
        # Not the ranked values divided by their scale, which may be 0.
        acts = pair_dots(None, indices, x, rows.W_enc, impl) + rows.b_enc[indices.long()]
    error = gather_sum(None, indices, acts, rows.W_dec, impl).add_(err)
    slopes = pair_dots(None, indices, error, rows.W_dec, impl)
    groups = group_by_latent(None, indices, acts, len(rows.b_enc))
    coef = slopes.reshape(-1)[groups.pairs]
    return _Sums(
        error.square().sum(),
        segment_sum(groups, coef, x, impl),
        segment_total(groups, coef, impl),
        segment_sum(groups, acts.reshape(-1)[groups.pairs], error, impl),
    )
