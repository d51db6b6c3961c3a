import torch
from torch import Tensor

from fastsae_kernels.code import LatentGroups, entry_rows


def group_by_latent(
    row_offsets: Tensor | None, indices: Tensor, acts: Tensor, d_sae: int
) -> LatentGroups:
    flat, active = indices.reshape(-1).tolist(), (acts != 0).reshape(-1).tolist()
    pairs = sorted((p for p in range(len(flat)) if active[p]), key=lambda p: (flat[p], p))
    rest = [p for p in range(len(flat)) if not active[p]]
    order = torch.tensor(pairs + rest, dtype=torch.int32)
    counts = torch.zeros(d_sae + 1, dtype=torch.int32)
    for p in pairs:
        counts[flat[p] + 1] += 1
    offsets = counts.cumsum(0, dtype=torch.int32)
    rows = entry_rows(row_offsets, indices).expand_as(indices).reshape(-1)[order.long()]
    return LatentGroups(*(t.to(acts.device) for t in (order, rows, offsets)))
