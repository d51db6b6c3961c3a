import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
) -> RaggedCode:
    z = _pre_acts(x, W_enc, b_enc, b_pre)
    z = z if scale is None else z * scale.to(z.dtype)
    limit = threshold.detach().to(z.dtype) if isinstance(threshold, Tensor) else threshold
    return _kept(z, (z <= limit).logical_not())


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    b_pre: Tensor | None,
) -> tuple[RaggedCode, Tensor]:
    z = _pre_acts(x, W_enc, b_enc, b_pre)
    theta = threshold.to(z.dtype)
    above = (z <= theta).logical_not()
    band = ((z - theta).abs() / bandwidth < 0.5).detach()
    # Of value 0, and the threshold's straight-through gradient.
    slope = band * (theta - theta.detach()) / bandwidth
    acts = torch.where(above, z, 0) - theta.detach() * slope
    return _kept(acts, above | band), (above.to(z.dtype) - slope).sum(1)


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
    acts = _pre_acts(x.detach(), W_enc, b_enc, b_pre).relu()
    err = acts @ W_dec.to(acts.dtype) + b_dec.to(acts.dtype) - x.detach().to(acts.dtype)
    mse = err.square().sum(-1).mean()
    l1 = (acts * W_dec.to(acts.dtype).norm(dim=1)).norm(p=lp_norm, dim=-1).mean()
    counts = (acts != 0).flatten(0, -2).sum(0)
    return mse + l1_coefficient * l1, mse.detach(), l1.detach(), err.detach(), counts


def _pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
    return centred @ W_enc.to(wide) + b_enc.to(wide)


def _kept(acts: Tensor, kept: Tensor) -> RaggedCode:
    offsets = torch.cat([kept.new_zeros(1), kept.sum(1)]).cumsum(0)
    return RaggedCode(offsets.int(), kept.nonzero()[:, 1].int(), acts[kept])
