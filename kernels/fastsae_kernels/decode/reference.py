import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode, SparseCode


def sparse_decode(code: SparseCode | RaggedCode, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    narrow = torch.promote_types(code.acts.dtype, W_dec.dtype)
    wide = torch.promote_types(narrow, torch.float32)
    x_hat = code.to_dense(W_dec.shape[0]).to(wide) @ W_dec.flatten(1).to(wide)
    x_hat = x_hat.unflatten(-1, W_dec.shape[1:])
    return (x_hat if b_dec is None else x_hat + b_dec.to(wide)).to(narrow)
