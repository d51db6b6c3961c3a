"""Sums over the active rows of a dictionary, and their products with a row, as registered ops."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl


def gather_sum(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, weight: Tensor, impl: Impl
) -> Tensor:
    """[B, D]: sum over each row's entries of acts * weight[indices].

    `indices` and `acts` are [B, K], or [nnz] with `row_offsets` [B + 1].
    """
    return _gather_sum(row_offsets, indices, acts, weight, impl.value)


def pair_dots(
    row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor, impl: Impl
) -> Tensor:
    """Like `indices`: rows[b] . weight[indices] of each entry of row b, never [B, K, D] at once."""
    return _pair_dots(row_offsets, indices, rows, weight, impl.value)


@torch.library.custom_op("fastsae::gather_sum", mutates_args=())
def _gather_sum(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, weight: Tensor, impl: str
) -> Tensor:
    if impl == Impl.TRITON:
        from fastsae_kernels.decode.kernel import gather_sum as run
    else:
        from fastsae_kernels.decode.eager import gather_sum as run
    return run(row_offsets, indices, acts, weight).to(acts.dtype)


@_gather_sum.register_fake
def _(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, weight: Tensor, impl: str
) -> Tensor:
    n_rows = indices.shape[0] if row_offsets is None else row_offsets.shape[0] - 1
    return acts.new_empty(n_rows, weight.shape[1])


@torch.library.custom_op("fastsae::pair_dots", mutates_args=())
def _pair_dots(
    row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor, impl: str
) -> Tensor:
    if impl == Impl.TRITON:
        from fastsae_kernels.decode.kernel import pair_dots as run
    else:
        from fastsae_kernels.decode.eager import pair_dots as run
    return run(row_offsets, indices, rows, weight)


@_pair_dots.register_fake
def _(
    row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor, impl: str
) -> Tensor:
    return rows.new_empty(indices.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
