"""What the ops and their rivals read, and how a run of them is written."""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from bench.cases import Case, batch
from fastsae_kernels import Impl, SparseCode, batch_topk_encode, topk_encode
from fastsae_kernels._dispatch import interpreted

Run = Callable[[], Tensor]
"""Does the work once and returns the value that parity is checked on."""


class Inputs:
    """What the ops and their rivals read. W_enc and W_dec are the fp32 masters."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        W = torch.randn(case.F, case.D, device=device, generator=generator)
        # Masters that their copies represent exactly, so that those who read either agree.
        W = W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True)).to(self.dtype)
        self.x = batch(case).to(device, self.dtype)
        self.W_enc = W.to(torch.float32, copy=True).t().requires_grad_()
        self.W_dec = W.to(torch.float32, copy=True).requires_grad_()
        self.b_enc = torch.zeros(case.F, device=device, requires_grad=True)
        self.b_dec = torch.zeros(case.D, device=device, requires_grad=True)
        self.half = W
        """[F, D], the encoder's and the decoder's weights as the products read them."""
        kernels = device == "cuda" or interpreted()
        self.impls = [Impl.TRITON, Impl.EAGER] if kernels else [Impl.EAGER]
        self.with_reference = [*self.impls, Impl.REFERENCE]

    @torch.no_grad()
    def code(self) -> SparseCode:
        return topk_encode(self.x, self.W_enc, self.b_enc, self.case.K, W_compute=self.half.t())

    @cached_property
    def touched(self) -> int:
        """How many latents are active on any row."""
        return len(self.code().indices.unique())

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """[F], all the same: about K B of the scores are above it, K a row on average."""
        k, weights = self.case.K, (self.W_enc, self.b_enc)
        least = batch_topk_encode(self.x, *weights, k, W_compute=self.half.t()).acts.amin()
        # Halfway between two values of bf16: scores that are rounded to it stay on their side.
        below = least.view(torch.int32) & -0x10000
        return (below | 0x8000).view(torch.float32).repeat(self.case.F)

    def compiled(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Inductor's C++ takes minutes to build on a CPU; the graph is the same.
        return torch.compile(run, backend="inductor" if self.device == "cuda" else "aot_eager")


def backward(loss: Tensor, *inputs: Tensor) -> Tensor:
    """Run the backward pass; the first gradient stands for all of them."""
    return torch.autograd.grad(loss, inputs)[0]


def by_impl(impls: Iterable[Impl], run: Callable[[Impl], Tensor]) -> dict[str, Run]:
    return {impl.value: lambda impl=impl: run(impl) for impl in impls}
