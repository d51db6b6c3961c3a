import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.code import entry_rows

with warnings.catch_warnings():
    # torch says once a process that CSR tensors are in beta; say it here, to nobody.
    warnings.simplefilter("ignore", UserWarning)
    torch.zeros(1, 1).to_sparse_csr()


def gather_sum(row_offsets: Tensor | None, indices: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
    # `embedding_bag` is twice as fast over int32.
    return F.embedding_bag(
        indices.int(),
        weight.to(acts.dtype),
        row_offsets,
        per_sample_weights=acts,
        mode="sum",
        include_last_offset=row_offsets is not None,
    )


def pair_dots(row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    products = _sampled_products if rows.device.type == "cpu" else _gathered_products
    return products(row_offsets, indices, rows, weight)


def _gathered_products(
    row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor
) -> Tensor:
    flat = indices.reshape(-1)
    owners = entry_rows(row_offsets, indices).expand_as(indices).reshape(-1)
    block = max(1, workspace_bytes() // (3 * rows.shape[1] * rows.element_size()))
    parts = [
        torch.linalg.vecdot(weight[j.long()].to(rows.dtype), rows[b.long()])
        for j, b in zip(flat.split(block), owners.split(block), strict=True)
    ]
    return torch.cat(parts).view_as(indices)


def _sampled_products(
    row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor
) -> Tensor:
    """A product sampled at a CSR pattern: on a CPU in the time of the decode."""
    if row_offsets is None:
        row_offsets = torch.arange(
            0, indices.numel() + 1, max(1, indices.shape[1]), dtype=torch.int32
        )
    pattern = torch.sparse_csr_tensor(
        row_offsets,
        indices.int().reshape(-1),
        rows.new_zeros(indices.numel()),
        (len(rows), weight.shape[0]),
        check_invariants=False,
    )
    products = torch.sparse.sampled_addmm(pattern, rows, weight.to(rows.dtype).t(), beta=0.0)
    return products.values().view_as(indices)
