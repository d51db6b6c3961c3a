import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.code import LatentGroups, entry_rows


def group_by_latent(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, d_sae: int
) -> LatentGroups:
    # Inactive pairs sort behind the last latent: sizes stay fixed and no count reaches the host.
    keys = torch.where(acts != 0, indices, d_sae).reshape(-1).to(torch.int32)
    sorted_keys, order = keys.sort(stable=True)
    latents = torch.arange(d_sae + 1, device=keys.device, dtype=torch.int32)
    offsets = torch.searchsorted(sorted_keys, latents, out_int32=True)
    pairs = order.to(torch.int32)
    if row_offsets is None:
        return LatentGroups(pairs, pairs // max(1, indices.shape[-1]), offsets)
    return LatentGroups(pairs, entry_rows(row_offsets, indices)[order], offsets)


def segment_sum(groups: LatentGroups, coef: Tensor, operand: Tensor) -> Tensor:
    active = int(groups.offsets[-1])
    return F.embedding_bag(
        groups.rows[:active],
        operand.to(coef.dtype),
        groups.offsets,
        per_sample_weights=coef[:active],
        mode="sum",
        include_last_offset=True,
    )


def segment_total(groups: LatentGroups, coef: Tensor) -> Tensor:
    ones = coef.new_ones(1, 1)
    return segment_sum(groups._replace(rows=torch.zeros_like(groups.rows)), coef, ones).squeeze(1)


def weighted_row_sum(table: Tensor, weights: Tensor) -> Tensor:
    total = weights.new_zeros(table.shape[1])
    rows = max(1, workspace_bytes() // (max(1, len(total)) * weights.element_size()))
    for part, factors in zip(table.split(rows), weights.split(rows), strict=True):
        total.addmv_(part.to(weights.dtype).t(), factors)
    return total
