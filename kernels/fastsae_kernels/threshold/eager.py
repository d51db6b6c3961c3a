from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import DenseGrad, RowGrad, emit, row_grads_of
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.code import RaggedCode


@torch.no_grad()
def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: float, b_pre: Tensor | None
) -> RaggedCode:
    centred, weight = _centred(x, b_pre), W_enc.to(torch.promote_types(x.dtype, torch.float32))
    counts, indices, acts = [], [], []
    for rows in centred.split(_chunk(centred, W_enc.shape[1])):
        pre_acts = torch.addmm(b_enc.to(rows.dtype), rows, weight)
        above = (pre_acts <= threshold).logical_not_()
        counts.append(above.sum(1))
        indices.append(above.nonzero()[:, 1].int())
        acts.append(pre_acts[above])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=x.device), *counts]).cumsum(0)
    return RaggedCode(offsets.int(), torch.cat(indices), torch.cat(acts))


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
    sinks = row_grads_of(W_enc), row_grads_of(W_dec)
    flat = x.detach().reshape(-1, x.shape[-1])
    total, mse, l1, err, counts = _ReLUL1Loss.apply(
        flat, W_enc, b_enc, W_dec, b_dec, b_pre, l1_coefficient, lp_norm, sinks
    )
    return total, mse, l1, err.reshape(x.shape), counts


class _ReLUL1Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        b_pre: Tensor | None,
        l1_coefficient: float,
        lp_norm: float,
        sinks: tuple[list[RowGrad] | None, list[RowGrad] | None],
    ) -> tuple[Tensor, ...]:
        learns = any(ctx.needs_input_grad)
        centred = _centred(x, b_pre)
        wide = centred.dtype
        enc, dec = W_enc.t().to(wide), W_dec.to(wide)  # [F, D] both
        norms = torch.linalg.vector_norm(dec, dim=1)
        d_enc, d_dec = (torch.zeros_like(dec), torch.zeros_like(dec)) if learns else (None, None)
        d_b_enc, d_norms = torch.zeros_like(norms), torch.zeros_like(norms)
        err = torch.empty(len(x), dec.shape[1], dtype=wide, device=x.device)
        mse, l1 = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
        counts = torch.zeros(len(dec), dtype=torch.int64, device=x.device)
        chunk = _chunk(centred, len(dec))
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            acts = torch.addmm(b_enc.to(wide), centred[rows], enc.t()).relu_()  # [chunk, F]
            err[rows] = torch.addmm(b_dec.to(wide), acts, dec).sub_(x[rows])
            weighted = acts * norms
            row_norms = torch.linalg.vector_norm(weighted, ord=lp_norm, dim=1)
            mse += err[rows].square().sum()
            l1 += row_norms.sum()
            active = acts != 0
            counts += active.sum(0)
            if d_enc is None or d_dec is None:
                continue
            scaled = err[rows] * (2 / len(x))
            d_dec.addmm_(acts.t(), scaled)
            # The p-norm's derivative by each weighted act; 0 / 0 where the act is 0.
            slope = weighted.div_(row_norms[:, None]).pow_(lp_norm - 1)
            slope = slope.masked_fill_(~active, 0).mul_(l1_coefficient / len(x))
            d_norms += (slope * acts).sum(0)
            d_pre = slope.mul_(norms).addmm_(scaled, dec.t()).mul_(active)
            d_enc.addmm_(d_pre.t(), centred[rows])
            d_b_enc += d_pre.sum(0)
        mse, l1 = mse / len(x), l1 / len(x)
        if d_dec is not None:
            d_dec.addcmul_(dec, (d_norms / norms.clamp_min(torch.finfo(wide).tiny))[:, None])
        ctx.save_for_backward(W_enc, err, d_enc, d_b_enc, d_dec)
        ctx.sinks = sinks
        ctx.dtypes = [None if t is None else t.dtype for t in (W_enc, b_enc, W_dec, b_dec, b_pre)]
        ctx.mark_non_differentiable(mse, l1, err, counts)
        return mse + l1_coefficient * l1, mse, l1, err, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        W_enc, err, d_enc, d_b_enc, d_dec = ctx.saved_tensors
        enc_dtype, b_enc_dtype, dec_dtype, b_dec_dtype, b_pre_dtype = ctx.dtypes
        needs_enc, needs_b_enc, needs_dec, needs_b_dec, needs_pre = ctx.needs_input_grad[1:6]
        d_W_enc = d_W_dec = d_b_pre = None
        if needs_enc:
            dense = emit(ctx.sinks[0], DenseGrad(d_enc * g), len(d_enc))
            d_W_enc = None if dense is None else dense.t().to(enc_dtype)
        if needs_dec:
            dense = emit(ctx.sinks[1], DenseGrad(d_dec * g), len(d_dec))
            d_W_dec = None if dense is None else dense.to(dec_dtype)
        d_b = d_b_enc * g
        if needs_pre:
            d_b_pre = -(W_enc.to(d_b.dtype) @ d_b).to(b_pre_dtype)
        d_b_enc = d_b.to(b_enc_dtype) if needs_b_enc else None
        d_b_dec = (err.sum(0) * (2 / len(err)) * g).to(b_dec_dtype) if needs_b_dec else None
        return None, d_W_enc, d_b_enc, d_W_dec, d_b_dec, d_b_pre, None, None, None


def _centred(x: Tensor, b_pre: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)


def _chunk(rows: Tensor, d_sae: int) -> int:
    """Rows whose acts, their weighted copy, mask and a product fit into the workspace."""
    return max(1, workspace_bytes() // (4 * d_sae * rows.element_size()))
