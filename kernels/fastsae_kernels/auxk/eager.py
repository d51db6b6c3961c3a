from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import centred, product_dtype
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.decode.ops import gather_sum, pair_dots
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import segment_sum, segment_total
from fastsae_kernels.shards import Shards
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
    shards: Shards | None = None,
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
    n_dead = [len(latents)] if shards is None else shards.counts(len(latents))
    k_aux, widest = min(half, sum(n_dead)), max(n_dead)
    if k_aux == 0 or len(x) == 0:
        d_enc, d_b_enc, d_dec = (torch.zeros_like(t) for t in rows[:3])
        return shifted.new_zeros(()), latents, d_enc, d_b_enc, d_dec
    weight = min(sum(n_dead) / half, 1) / len(x)
    pick = _Pick(k_aux, widest, shards)
    if absolute or widest <= DENSE_BELOW[impl] * k_aux:
        sums = _dense(shifted, err, rows, pick, absolute)
    else:
        sums = _sparse(shifted, shifted.to(product_dtype(x)), err, rows, pick, impl)
    d_enc, d_b_enc, d_dec = (grad.mul_(2 * weight) for grad in sums[1:])
    return sums.loss * weight, latents, d_enc, d_b_enc, d_dec


class _Pick(NamedTuple):
    """k_aux latents a row, over all shards."""

    k_aux: int
    widest: int
    """Dead latents of the shard that has most."""
    shards: Shards | None

    @property
    def width(self) -> int:
        return min(self.k_aux, self.widest)

    def cut(self, values: Tensor, *of_latents: Tensor) -> list[Tensor]:
        """[B, w] each, 0 where `values`, descending, are not among the largest of all shards."""
        if self.shards is None:
            return [*of_latents]
        kept = self.shards.keep_topk(values, self.k_aux, self.width)
        return [torch.where(kept, t, 0) for t in of_latents]

    def total(self, part: Tensor) -> Tensor:
        return part if self.shards is None else self.shards.total(part)


def _dense(x: Tensor, err: Tensor, rows: _Dictionary, pick: _Pick, absolute: bool) -> _Sums:
    """Row-chunked products with the compact rows; three [chunk, n] tensors at a time."""
    sums = _Sums(x.new_zeros(()), *(torch.zeros_like(t) for t in rows[:3]))
    chunk = max(1, workspace_bytes() // (4 * pick.widest * x.element_size()))
    k_here = min(pick.k_aux, len(rows.b_enc))
    for x_c, err_c in zip(x.split(chunk), err.split(chunk), strict=True):
        h = torch.addmm(rows.b_enc, x_c, rows.W_enc.t())  # [chunk, n]
        ranked = h if rows.scale is None else h * rows.scale
        ranked = ranked.abs() if absolute else ranked
        values, picked = ranked.topk(k_here, dim=1, sorted=pick.shards is not None)
        chosen, kept = pick.cut(values, h.gather(1, picked), torch.ones_like(values))
        acts = torch.zeros_like(h).scatter_(1, picked, chosen)
        error = pick.total(acts @ rows.W_dec).add_(err_c)
        sums.loss.add_(error.square().sum())
        sums.W_dec.addmm_(acts.t(), error)
        slopes = torch.mm(error, rows.W_dec.t(), out=h).gather(1, picked).mul_(kept)
        d_h = acts.zero_().scatter_(1, picked, slopes)
        sums.W_enc.addmm_(d_h.t(), x_c)
        sums.b_enc.add_(d_h.sum(0))
    return sums


def _sparse(
    x: Tensor, scored: Tensor, err: Tensor, rows: _Dictionary, pick: _Pick, impl: Impl
) -> _Sums:
    """`scored` are the rows in the dtype of the product that ranks the latents."""
    k_here = min(pick.k_aux, len(rows.b_enc))
    values, indices = select_topk(
        scored, rows.W_enc.t(), rows.b_enc, k_here, rows.scale, signed=True, impl=impl
    )
    acts = values
    if rows.scale is not None:
        # Not the ranked values divided by their scale, which may be 0.
        acts = pair_dots(None, indices, x, rows.W_enc, impl) + rows.b_enc[indices.long()]
    (acts,) = pick.cut(values, acts)
    error = pick.total(gather_sum(None, indices, acts, rows.W_dec, impl)).add_(err)
    slopes = pair_dots(None, indices, error, rows.W_dec, impl)
    groups = group_by_latent(None, indices, acts, len(rows.b_enc))
    coef = slopes.reshape(-1)[groups.pairs]
    return _Sums(
        error.square().sum(),
        segment_sum(groups, coef, x, impl),
        segment_total(groups, coef, impl),
        segment_sum(groups, acts.reshape(-1)[groups.pairs], error, impl),
    )
