import torch
from torch import Tensor

from fastsae_kernels.code import entry_rows
from fastsae_kernels.decode.eager import gather_sum, pair_dots


def mse_l1_rows(
    x: Tensor,
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    needs_dots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    err = gather_sum(row_offsets, indices, acts, W_dec).add_(b_dec).sub_(x)
    row_mse = torch.linalg.vector_norm(err, dim=1).square()
    dots = pair_dots(row_offsets, indices, err, W_dec) if needs_dots else acts.new_empty(0)
    return row_mse, l1_rows(row_offsets, indices, acts, l1_weight), err, dots


def l1_rows(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, l1_weight: Tensor | None
) -> Tensor:
    weighted = acts.abs()
    if l1_weight is not None:
        weighted = weighted * l1_weight.to(acts.dtype)[indices.long()]
    if row_offsets is None:
        return weighted.sum(1)
    owners = entry_rows(row_offsets, indices)
    return weighted.new_zeros(len(row_offsets) - 1).index_add(0, owners, weighted)
