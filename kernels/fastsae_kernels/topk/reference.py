import torch
from torch import Tensor

from fastsae_kernels.code import SparseCode


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_pre: Tensor | None, scale: Tensor | None
) -> SparseCode:
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) if b_pre is None else x.to(wide) - b_pre.to(wide)
    pre_acts = centred @ W_enc.to(wide) + b_enc.to(wide)
    pre_acts = pre_acts if scale is None else pre_acts * scale.to(wide)
    acts, indices = pre_acts.relu().sort(dim=-1, descending=True, stable=True)
    return SparseCode(acts[..., :k].contiguous(), indices[..., :k].int().contiguous())
