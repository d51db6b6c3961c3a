import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: float, b_pre: Tensor | None
) -> RaggedCode:
    with torch.no_grad():
        pre_acts = _pre_acts(x, W_enc, b_enc, b_pre)
    above = (pre_acts <= threshold).logical_not()
    offsets = torch.cat([above.new_zeros(1), above.sum(1)]).cumsum(0)
    return RaggedCode(offsets.int(), above.nonzero()[:, 1].int(), pre_acts[above])


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
