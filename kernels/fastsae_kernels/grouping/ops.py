"""Sums over the pairs of each latent and over all latents, as registered ops."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels.code import LatentGroups


def segment_sum(groups: LatentGroups, coef: Tensor, operand: Tensor, impl: Impl) -> Tensor:
    """[F, D]: for each latent the sum of coef[p] * operand[rows[p]] over its pairs p.

    `coef` is [P] in the order of `groups.pairs`; `operand` is [B, D]. In a fixed order.
    """
    return _segment_sum(groups.rows, groups.offsets, coef, operand, impl.value)


def segment_total(groups: LatentGroups, coef: Tensor, impl: Impl) -> Tensor:
    """[F]: for each latent the sum of coef[p] over its pairs p, in a fixed order."""
    return _segment_total(groups.rows, groups.offsets, coef, impl.value)


def weighted_row_sum(table: Tensor, weights: Tensor, impl: Impl) -> Tensor:
    """[D], in the dtype of `weights`: the sum of weights[j] * table[j] over the rows j of [F, D].

    In a fixed order. `table` may be of a narrower dtype, which is widened for the arithmetic.
    """
    return _weighted_row_sum(table, weights, impl.value)


@torch.library.custom_op("fastsae::segment_sum", mutates_args=())
def _segment_sum(rows: Tensor, offsets: Tensor, coef: Tensor, operand: Tensor, impl: str) -> Tensor:
    if impl == Impl.TRITON:
        from fastsae_kernels.grouping.kernel import segment_sum as run
    else:
        from fastsae_kernels.grouping.eager import segment_sum as run
    return run(LatentGroups(rows, rows, offsets), coef, operand).to(coef.dtype)


@_segment_sum.register_fake
def _(rows: Tensor, offsets: Tensor, coef: Tensor, operand: Tensor, impl: str) -> Tensor:
    return coef.new_empty(offsets.shape[0] - 1, operand.shape[1])


@torch.library.custom_op("fastsae::segment_total", mutates_args=())
def _segment_total(rows: Tensor, offsets: Tensor, coef: Tensor, impl: str) -> Tensor:
    if impl == Impl.TRITON:
        from fastsae_kernels.grouping.kernel import segment_total as run
    else:
        from fastsae_kernels.grouping.eager import segment_total as run
    return run(LatentGroups(rows, rows, offsets), coef).to(coef.dtype)


@_segment_total.register_fake
def _(rows: Tensor, offsets: Tensor, coef: Tensor, impl: str) -> Tensor:
    return coef.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("fastsae::weighted_row_sum", mutates_args=())
def _weighted_row_sum(table: Tensor, weights: Tensor, impl: str) -> Tensor:
    if impl == Impl.TRITON:
        from fastsae_kernels.grouping.row_sum import weighted_row_sum as run
    else:
        from fastsae_kernels.grouping.eager import weighted_row_sum as run
    return run(table, weights).to(weights.dtype)


@_weighted_row_sum.register_fake
def _(table: Tensor, weights: Tensor, impl: str) -> Tensor:
    return weights.new_empty(table.shape[1])
