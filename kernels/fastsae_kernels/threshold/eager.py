"""Scores in blocks of whole rows, at most half the workspace; the other half finds the entries.

Outputs are gathered block by block and joined at the end, so they are held twice for a moment.
"""

import torch
from torch import Tensor

from fastsae_kernels._workspace import scratch, workspace_bytes
from fastsae_kernels.code import MOST_ENTRIES
from fastsae_kernels.topk.eager import score

# Bytes an element of a block takes while its entries are found: a mask and an int64 position.
BYTES_A_CANDIDATE = 10


def select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae, half = W_enc.shape[1], workspace_bytes() // 2
    n_rows = max(1, min(len(x), half // (d_sae * limit.element_size())))
    n_searched = max(1, half // (d_sae * BYTES_A_CANDIDATE))
    buffer = scratch(n_rows * d_sae, limit)
    weight = W_enc.to(x.dtype)
    row_ends = torch.arange(1, min(n_rows, n_searched) + 1, device=x.device) * d_sae
    nnz, row_offsets = 0, [row_ends.new_zeros(1)]
    indices, values = [row_ends[:0].int()], [limit[:0]]
    for rows in x.split(n_rows):
        for scores in score(rows, weight, b_enc, scale, buffer).split(n_searched):
            # "Not at or below" rather than "above": NaN passes and stays visible.
            above = (scores <= limit).logical_not_()
            places = above.view(-1).nonzero().squeeze(1)
            row_offsets.append(torch.searchsorted(places, row_ends[: len(scores)]) + nnz)
            values.append(scores.view(-1)[places])
            indices.append(places.remainder_(d_sae).int())
            nnz += len(places)
    if nnz > MOST_ENTRIES:
        raise ValueError(
            f"threshold must leave at most 2^31 - 1 entries (row offsets are int32), got {nnz}; "
            "encode fewer rows at a time"
        )
    return torch.cat(row_offsets).int(), torch.cat(indices), torch.cat(values)
