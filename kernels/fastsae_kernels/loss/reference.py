import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode, SparseCode


def mse_l1_loss(
    x: Tensor,
    code: SparseCode | RaggedCode,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(code.acts.dtype, torch.float32)
    acts = code.to_dense(W_dec.shape[0]).to(wide)
    rows = torch.ones_like(acts[..., 0]) if row_weight is None else row_weight.to(wide)
    kept = rows.unsqueeze(-1) != 0
    acts = torch.where(kept, acts, 0)
    x_hat = acts @ W_dec.flatten(1).to(wide) + b_dec.flatten().to(wide)
    err = x_hat - torch.where(kept, x.detach().reshape(x_hat.shape).to(wide), 0)
    weighted = acts.abs() if l1_weight is None else acts.abs() * l1_weight.to(wide)
    share = rows / rows.sum()
    mse, l1 = (err.square().sum(-1) * share).sum(), (weighted.sum(-1) * share).sum()
    return mse, l1, err.detach().reshape(x.shape)
