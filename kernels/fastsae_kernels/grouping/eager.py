import torch
from torch import Tensor

from fastsae_kernels.code import LatentGroups


def group_by_latent(acts: Tensor, indices: Tensor, d_sae: int) -> LatentGroups:
    # Inactive pairs sort behind the last latent: sizes stay fixed and no count reaches the host.
    keys = torch.where(acts != 0, indices, d_sae).reshape(-1).to(torch.int32)
    sorted_keys, order = keys.sort(stable=True)
    latents = torch.arange(d_sae + 1, device=keys.device, dtype=torch.int32)
    offsets = torch.searchsorted(sorted_keys, latents, out_int32=True)
    pairs = order.to(torch.int32)
    return LatentGroups(pairs, pairs // indices.shape[-1], offsets)
