"""The loss of a ReLU SAE and its gradients, one chunk of rows under the workspace at a time."""

import torch
from torch import Tensor

from fastsae_kernels._workspace import workspace_bytes


def relu_l1_sums(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    b_pre: Tensor | None,
    l1_coefficient: float,
    lp_norm: float,
    needs_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
    enc, dec = W_enc.t().to(wide), W_dec.to(wide)  # [F, D] both
    norms = torch.linalg.vector_norm(dec, dim=1)
    shapes = (dec.shape, norms.shape, dec.shape) if needs_grads else ((0,),) * 3
    d_enc, d_b_enc, d_dec = (norms.new_zeros(shape) for shape in shapes)
    d_norms = torch.zeros_like(norms)
    err = torch.empty(len(x), dec.shape[1], dtype=wide, device=x.device)
    mse, l1 = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
    counts = torch.zeros(len(dec), dtype=torch.int64, device=x.device)
    # Acts, their weighted copy, mask and a product.
    chunk = max(1, workspace_bytes() // (4 * len(dec) * norms.element_size()))
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
        if not needs_grads:
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
    if needs_grads:
        d_dec.addcmul_(dec, (d_norms / norms.clamp_min(torch.finfo(wide).tiny))[:, None])
    return mse, l1, err, counts, d_enc, d_b_enc, d_dec
