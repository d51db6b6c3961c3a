"""Sampled dense-dense products: the gradient of a code's activations."""

import warnings

import torch
from torch import Tensor

from fastsae_kernels._workspace import workspace_bytes

with warnings.catch_warnings():
    # torch says once a process that CSR tensors are in beta; say it here, to nobody.
    warnings.simplefilter("ignore", UserWarning)
    torch.zeros(1, 1).to_sparse_csr()


def pair_dots(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """[B, K]: rows[b] . weight[indices[b, k]], without gathering [B, K, D] on a CPU."""
    n_rows, n_slots = indices.shape
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        crow = torch.arange(0, indices.numel() + 1, n_slots, dtype=torch.int32)
        pattern = torch.sparse_csr_tensor(
            crow,
            indices.int().reshape(-1),
            rows.new_zeros(indices.numel()),
            (n_rows, weight.shape[0]),
            check_invariants=False,
        )
        return (
            torch.sparse.sampled_addmm(pattern, rows, weight.t(), beta=0.0)
            .values()
            .view_as(indices)
        )
    block = max(1, workspace_bytes() // (n_slots * weight.shape[1] * weight.element_size()))
    return torch.cat(
        [
            torch.bmm(weight[i.long()], r.to(weight.dtype).unsqueeze(2)).squeeze(2)
            for i, r in zip(indices.split(block), rows.split(block), strict=True)
        ]
    )
