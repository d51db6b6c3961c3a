import torch
from torch import Tensor


def aux_topk(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    n_dead, half = int(dead.sum()), max(1, x.shape[-1] // 2)
    centred = x.detach().to(wide) - (0 if b_pre is None else b_pre.to(wide))
    h = centred @ W_enc.to(wide) + b_enc.to(wide)
    ranked = h if scale is None else h * scale.to(wide)
    ranked = ranked.abs() if absolute else ranked
    picked = ranked.where(dead, -torch.inf).topk(min(half, n_dead)).indices
    acts = torch.zeros_like(h).scatter(-1, picked, h.gather(-1, picked))
    error = acts @ W_dec.to(wide) + err.detach().to(wide)
    return error.square().sum(-1).mean() * min(n_dead / half, 1)
