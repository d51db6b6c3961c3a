"""Norms of a dictionary's rows, whose gradient a row optimizer can take."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import RowGrad, emit_dense, row_grads_of


def row_norms(weight: Tensor) -> Tensor:
    """|weight[j]| for each row j of a weight [F, D], as `weight.norm(dim=1)`.

    Its gradient d norms[j] weight[j] / |weight[j]| goes where those of the other ops go: to the row
    optimizer's list if one collects for the weight, else to `.grad`.
    """
    norms = _RowNorms.apply(weight, row_grads_of(weight))
    assert isinstance(norms, Tensor)
    return norms


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sink: list[RowGrad] | None) -> Tensor:
        norms = torch.linalg.vector_norm(weight, dim=1)
        ctx.save_for_backward(weight, norms)
        ctx.sink = sink
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        weight, norms = ctx.saved_tensors
        slope = torch.where(norms > 0, g / norms, 0)
        return emit_dense(ctx.sink, weight * slope[:, None]), None
