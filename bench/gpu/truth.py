"""The results in fp64, a piece at a time, of some rows or latents of a real size."""

import torch
from torch import Tensor

from fastsae_kernels import LatentGroups, SparseCode

PIECE = 1 << 27
"""Elements of an fp64 intermediate: a gigabyte."""


def largest(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [n, k], fp64, and indices of the k largest relu(x weight^T + bias); weight [F, D]."""
    found_values, found_indices = [], []
    columns = max(k, PIECE // max(weight.shape[1], 1))
    for rows in x.double().split(max(1, PIECE // min(columns, len(weight)))):
        values = rows.new_empty(len(rows), 0)
        indices = values.long()
        for start in range(0, len(weight), columns):
            part = weight[start : start + columns].double()
            scores = (rows @ part.t() + bias[start : start + columns].double()).relu()
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            values = torch.cat([values, best.values], 1)
            indices = torch.cat([indices, best.indices + start], 1)
            values, kept = values.topk(min(k, values.shape[1]), dim=1)
            indices = indices.gather(1, kept)
        found_values.append(values)
        found_indices.append(indices)
    return torch.cat(found_values), torch.cat(found_indices)


def scores_at(x: Tensor, weight: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """[n, k] fp64: relu(x weight^T + bias) at `indices` [n, k]."""
    size = max(1, PIECE // max(1, indices.shape[1] * weight.shape[1]))
    parts = []
    for rows, at in zip(x.split(size), indices.long().split(size), strict=True):
        dots = torch.einsum("nkd,nd->nk", weight[at].double(), rows.double())
        parts.append((dots + bias[at].double()).relu())
    return torch.cat(parts)


def decoded(code: SparseCode, weight: Tensor) -> Tensor:
    """[n, D] fp64."""
    size = max(1, PIECE // max(1, code.indices.shape[1] * weight.shape[1]))
    parts = []
    for acts, at in zip(code.acts.split(size), code.indices.long().split(size), strict=True):
        parts.append(torch.einsum("nk,nkd->nd", acts.double(), weight[at].double()))
    return torch.cat(parts)


def segment(groups: LatentGroups, coef: Tensor, operand: Tensor, latent: int) -> Tensor:
    """[D] fp64: the sum over one latent's pairs of coef * operand[row]."""
    first, last = int(groups.offsets[latent]), int(groups.offsets[latent + 1])
    rows = operand[groups.rows[first:last].long()].double()
    return coef[first:last].double() @ rows
