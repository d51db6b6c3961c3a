import torch
from torch import Tensor

from fastsae_kernels.code import RaggedCode


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, b_pre: Tensor | None, scale: Tensor | None
) -> RaggedCode:
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
    pre_acts = centred @ W_enc.to(wide) + b_enc.to(wide)
    pre_acts = pre_acts if scale is None else pre_acts * scale.to(wide)
    acts = pre_acts.relu().flatten()
    places = acts.argsort(descending=True, stable=True)[:n_kept].sort().values
    rows = places // W_enc.shape[1]
    counts = rows.bincount(minlength=len(x))
    offsets = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
    return RaggedCode(offsets.int(), (places % W_enc.shape[1]).int(), acts[places])
