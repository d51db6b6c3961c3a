import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode, SparseCode


def sparse_decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    return _dense_decode(code.to_dense(W_dec.shape[0]), W_dec, b_dec)


def ragged_decode(code: RaggedCode, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    return _dense_decode(code.to_dense(W_dec.shape[0]), W_dec, b_dec)


def _dense_decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(acts.dtype, W_dec.dtype), torch.float32)
    x_hat = acts.to(wide) @ W_dec.to(wide)
    x_hat = x_hat if b_dec is None else x_hat + b_dec.to(wide)
    return x_hat.to(torch.promote_types(acts.dtype, W_dec.dtype))
