"""Encodes, forward and through their gradients."""

from typing import Any

import torch
from torch import Tensor

from bench.rivals.inputs import Inputs, Run, backward, by_impl
from fastsae_kernels import (
    Impl,
    batch_topk_encode,
    jumprelu_encode,
    threshold_encode,
    topk_encode,
)

BANDWIDTH = 0.05


def topk_encode_runs(t: Inputs) -> dict[str, Run]:
    k, half, bias = t.case.K, t.half.t(), t.b_enc.detach().to(t.dtype)

    def plain() -> Tensor:
        return torch.addmm(bias, t.x, half).relu().topk(k, dim=1).values

    @torch.no_grad()
    def ours(impl: Impl) -> Tensor:
        return topk_encode(t.x, t.W_enc, t.b_enc, k, W_compute=half, impl=impl).acts

    return {
        **by_impl(t.with_reference, ours),
        "mm": lambda: torch.mm(t.x, half),
        "mm + torch.topk": plain,
    }


def topk_encode_backward_runs(t: Inputs) -> dict[str, Run]:
    k, weights = t.case.K, (t.W_enc, t.b_enc)

    def plain() -> Tensor:
        scores = torch.addmm(t.b_enc.to(t.dtype), t.x, t.W_enc.to(t.dtype))
        return backward(scores.relu().topk(k, dim=1).values.float().sum(), *weights)

    def ours(impl: Impl) -> Tensor:
        code = topk_encode(t.x, *weights, k, W_compute=t.half.t(), impl=impl)
        return backward(code.acts.sum(), *weights)

    return {**by_impl(t.with_reference, ours), "mm + torch.topk": plain}


def batch_topk_encode_runs(t: Inputs) -> dict[str, Run]:
    """Without the reference: it sorts all B F scores, which says nothing of an encode."""
    k, half, bias = t.case.K, t.half.t(), t.b_enc.detach().to(t.dtype)

    def plain() -> Tensor:
        scores = torch.addmm(bias, t.x, half).relu()
        return scores.flatten().topk(k * len(t.x), sorted=False).values

    @torch.no_grad()
    def ours(impl: Impl) -> Tensor:
        return batch_topk_encode(t.x, t.W_enc, t.b_enc, k, W_compute=half, impl=impl).acts

    return {**by_impl(t.impls, ours), "mm + torch.topk": plain}


def threshold_encode_runs(t: Inputs) -> dict[str, Run]:
    limit, half, bias = t.threshold(), t.half.t(), t.b_enc.detach().to(t.dtype)

    def plain() -> Tensor:
        scores = torch.addmm(bias, t.x, half)
        places = (scores > limit).flatten().nonzero().squeeze(1)
        return scores.flatten()[places]

    @torch.no_grad()
    def ours(impl: Impl) -> Tensor:
        return threshold_encode(
            t.x, t.W_enc, t.b_enc, threshold=limit, W_compute=half, impl=impl
        ).acts

    return {**by_impl(t.with_reference, ours), "mm + nonzero": plain}


def jumprelu_encode_runs(t: Inputs) -> dict[str, Run]:
    theta = t.threshold().requires_grad_()
    learned = theta, t.W_enc, t.b_enc  # the first gradient is compared: that of the band

    def plain() -> Tensor:
        scores = torch.addmm(t.b_enc.to(t.dtype), t.x, t.W_enc.to(t.dtype))
        acts, l0 = _JumpReLU.apply(scores, theta)
        return backward(acts.float().sum() + l0.mean(), *learned)

    def ours(impl: Impl) -> Tensor:
        code, l0 = jumprelu_encode(
            t.x, t.W_enc, t.b_enc, theta, BANDWIDTH, W_compute=t.half.t(), impl=impl
        )
        return backward(code.acts.sum() + l0.mean(), *learned)

    return {**by_impl(t.with_reference, ours), "dense autograd": plain}


class _JumpReLU(torch.autograd.Function):
    """Dense acts and l0 of scores [B, F], in the convention of `jumprelu_encode`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scores, theta)
        above = scores > theta
        return scores * above, above.sum(1, dtype=theta.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_l0: Tensor) -> tuple[Tensor, Tensor]:
        scores, theta = ctx.saved_tensors
        band = (scores - theta).abs() < BANDWIDTH / 2
        slope = (g * theta + g_l0[:, None]) * band
        return g * (scores > theta), slope.sum(0) / -BANDWIDTH
