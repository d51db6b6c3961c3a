"""The best plain PyTorch known, without any library."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step, half


def plain_step(start: Start) -> Step:
    """Dense scores, `topk`, a bag for the decoder, fused Adam."""
    case, device = start.case, start.device
    W_enc = start.W_enc.clone().requires_grad_()
    W_dec = start.W_dec.clone().requires_grad_()
    b_enc = start.b_enc.clone().requires_grad_()
    b_dec = torch.zeros(case.D, requires_grad=True, device=device)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    since_fired = torch.zeros(case.F, dtype=torch.long, device=device)

    def step(x: Tensor) -> float:
        norms = W_dec.detach().norm(dim=1)
        with half(x):
            h = torch.addmm(b_enc, x - b_dec, W_enc)
        indices = (h.detach() * norms).topk(case.K, dim=1, sorted=False).indices
        acts = h.gather(1, indices).relu().float()
        x_hat = F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec
        mse = (x_hat - x).square().sum(1).mean()
        optimizer.zero_grad()
        mse.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        fired = indices.flatten().bincount(minlength=case.F) > 0
        since_fired.add_(len(x)).masked_fill_(fired, 0)
        return float(mse.detach())

    return step
