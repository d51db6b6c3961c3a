"""W_enc's memory is one row a latent, not one row an input: whoever reads or steps keeps that."""

import torch
from torch import Tensor


def restore_memory_order(like: Tensor, values: Tensor) -> Tensor:
    """`values` with the strides of `like`: files are row-major, W_enc is not."""
    return torch.empty_like(like, dtype=values.dtype).copy_(values)


def check_strides(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.stride() != parameter.stride():
        raise RuntimeError(
            f"{name} must have its parameter's strides {parameter.stride()}, got "
            f"{tensor.stride()}; restore them with restore_memory_order after loading"
        )


def rows_of(tensor: Tensor) -> Tensor:
    """The contiguous view of a weight with one latent a row; a bias becomes one column."""
    if tensor.ndim == 1:
        return tensor.unsqueeze(1)
    transposed = tensor.stride(0) == 1 and tensor.stride(1) == tensor.shape[0]
    return tensor.t() if transposed else tensor
