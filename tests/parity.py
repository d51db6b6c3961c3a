"""Parity: an implementation may be no further from the fp64 truth than the reference is.

Inputs lie on a lattice on which every score is exact in fp32 and no two of a row are equal, so that
all implementations select the same latents and what differs is rounding alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae_kernels import Impl
from fastsae_kernels._dispatch import TRITON_INSTALLED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run: on a GPU, or in Triton's interpreter."""

EVERY_IMPL = [Impl.EAGER, Impl.REFERENCE, *([Impl.TRITON] if TRITON_INSTALLED else [])]

SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""What an implementation's relative error may be above the reference's own."""

Inputs = dict[str, Tensor]
Losses = Callable[[Inputs, Impl], dict[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    B: int
    D: int
    F: int
    K: int

    def __str__(self) -> str:
        return f"B{self.B}-D{self.D}-F{self.F}-K{self.K}"


SHAPES = [
    Shape(16, 32, 256, 8),
    Shape(17, 33, 257, 7),
    Shape(5, 19, 1003, 20),
    Shape(1, 7, 65, 3),
    Shape(9, 12, 40, 1),
    Shape(3, 5, 11, 11),
]


KERNEL_SHAPES = [
    Shape(4, 32, 128, 8),
    Shape(5, 33, 97, 5),
    Shape(2, 19, 150, 9),
    Shape(1, 7, 65, 3),
    Shape(9, 12, 40, 1),
    Shape(3, 5, 11, 11),
]
"""The same oddities, small enough for the interpreter."""


def _cases() -> list[Any]:
    """Every dtype and shape in `eager`; in the interpreter every shape once, the dtypes in turn."""
    halves = [torch.float32, torch.bfloat16, torch.float16]
    # On a GPU eager's products come back rounded to their dtype, which ranks other latents.
    eager = [torch.float64, torch.float32] if DEVICE == "cuda" else [torch.float64, *halves]
    cases = [(Impl.EAGER, dtype, shape) for shape in SHAPES for dtype in eager]
    if TRITON_INSTALLED:
        every = product(SHAPES, halves) if DEVICE == "cuda" else zip(KERNEL_SHAPES, cycle(halves))
        cases += [(Impl.TRITON, dtype, shape) for shape, dtype in every]
    name = lambda impl, dtype, shape: f"{impl.value}-{str(dtype).removeprefix('torch.')}-{shape}"
    return [pytest.param(*case, id=name(*case)) for case in cases]


CASES = _cases()
"""What is held to the reference: an implementation, a dtype, a shape. The kernels take no fp64."""


def lattice(*shape: int, steps: int = 8) -> Tensor:
    """Multiples of 1/8 in [-1, 1], exact in every dtype down to bf16."""
    return torch.randint(-steps, steps + 1, shape, device=DEVICE).double() / steps


def weights(shape: Shape) -> Inputs:
    """An SAE's inputs in fp64; b_enc makes every score of a row distinct."""
    order = torch.randperm(shape.F, device=DEVICE).double()
    return {
        "x": lattice(shape.B, shape.D),
        "W_enc": lattice(shape.F, shape.D).t(),
        "b_enc": order * 2.0**-18,
        "W_dec": lattice(shape.F, shape.D),
        "b_dec": lattice(shape.D),
    }


def relative_error(got: Tensor, truth: Tensor) -> float:
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach()
    scale = truth.double().abs().max().clamp_min(1e-300)
    return float((got.detach().double() - truth.double()).abs().max() / scale)


def outputs_and_gradients(losses: Losses, inputs: Inputs, impl: Impl) -> dict[str, Tensor]:
    """Every output, and for every 0-dim output the gradient of every floating input."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    leaves = {
        k: torch.empty_like(inputs[k]).copy_(v).detach().requires_grad_() for k, v in leaves.items()
    }
    found = losses(leaves, impl)
    results = {name: value.detach() for name, value in found.items()}
    for name, value in found.items():
        if value.ndim == 0 and value.requires_grad:
            grads = torch.autograd.grad(
                value, list(leaves.values()), retain_graph=True, allow_unused=True
            )
            for leaf, grad in zip(leaves, grads, strict=True):
                zero = torch.zeros_like(inputs[leaf])
                results[f"d{name}/d{leaf}"] = zero if grad is None else grad
    return results


def check_parity(
    losses: Losses, inputs: Inputs, dtypes: dict[str, torch.dtype], impl: Impl = Impl.EAGER
) -> None:
    """Hold `impl` to the reference at fp64, output by output and gradient by gradient."""
    cast = {
        k: torch.empty_like(v, dtype=dtypes.get(k, v.dtype)).copy_(v) for k, v in inputs.items()
    }
    slack = max(SLACK[t.dtype] for t in cast.values())
    truth = outputs_and_gradients(losses, inputs, Impl.REFERENCE)
    reference = outputs_and_gradients(losses, cast, Impl.REFERENCE)
    found = outputs_and_gradients(losses, cast, impl)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        allowed = relative_error(reference[name], exact) + slack
        error = relative_error(found[name], exact)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def all_in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Everything in `dtype`, the encoder's bias in fp32 at least so that scores stay distinct."""
    names = ("x", "W_enc", "W_dec", "b_dec", "scale", "l1_weight", "err")
    wide = torch.promote_types(dtype, torch.float32)
    return {**dict.fromkeys(names, dtype), "b_enc": wide}
