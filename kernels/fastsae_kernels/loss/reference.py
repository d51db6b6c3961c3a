import torch
from torch import Tensor

from fastsae_kernels.code import SparseCode


def mse_l1_loss(
    x: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor, l1_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(code.acts.dtype, torch.float32)
    acts = code.to_dense(W_dec.shape[0]).to(wide)
    err = acts @ W_dec.to(wide) + b_dec.to(wide) - x.detach().to(wide)
    weighted = acts.abs() if l1_weight is None else acts.abs() * l1_weight.to(wide)
    return err.square().sum(-1).mean(), weighted.sum(-1).mean(), err.detach()
