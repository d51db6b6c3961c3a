"""The best plain PyTorch known, without any library."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step, half

Mse = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From indices, acts, W_dec, b_dec and x to the mean over rows of the squared error."""


def bag_mse(indices: Tensor, acts: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> Tensor:
    x_hat = F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec
    return (x_hat - x).square().sum(1).mean()


def dense_mse(indices: Tensor, acts: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> Tensor:
    code = acts.new_zeros(len(x), len(W_dec)).scatter(1, indices, acts)
    with half(x):
        x_hat = torch.addmm(b_dec, code, W_dec)
    return (x_hat.float() - x).square().sum(1).mean()


def plain_step(start: Start, mse_of: Mse = bag_mse, *, compiled: bool = False) -> Step:
    """Dense scores, `topk`, a bag for the decoder, fused Adam.

    Args:
        compiled: compute the loss and its gradients by torch.compile.
    """
    case, device = start.case, start.device
    W_enc = start.W_enc.clone().requires_grad_()
    W_dec = start.W_dec.clone().requires_grad_()
    b_enc = start.b_enc.clone().requires_grad_()
    b_dec = torch.zeros(case.D, requires_grad=True, device=device)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    since_fired = torch.zeros(case.F, dtype=torch.long, device=device)

    def loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        norms = W_dec.detach().norm(dim=1)
        with half(x):
            h = torch.addmm(b_enc, x - b_dec, W_enc)
        indices = (h.detach() * norms).topk(case.K, dim=1, sorted=False).indices
        acts = h.gather(1, indices).relu().float()
        return mse_of(indices, acts, W_dec, b_dec, x), indices

    if compiled:
        # Inductor's C++ takes minutes to build on a CPU; the graph is the same.
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        loss_of = torch.compile(loss_of, backend=backend, fullgraph=True)

    def step(x: Tensor) -> float:
        mse, indices = loss_of(x)
        optimizer.zero_grad()
        mse.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        fired = indices.flatten().bincount(minlength=case.F) > 0
        since_fired.add_(len(x)).masked_fill_(fired, 0)
        return float(mse.detach())

    return step
