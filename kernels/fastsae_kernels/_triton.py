"""What every Triton kernel of this package shares. Imported by `kernel.py` files only."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastsae_kernels._dispatch import interpreted

# `triton.jit` as a type checker should see it: it takes `kernel[grid](..., num_warps=4)` for an
# ordinary call, and a kernel's body for ordinary Python.
jit: Any = triton.jit

# Triton's interpreter multiplies bf16 operands of `tl.dot` wrongly without a word, so kernels widen
# them there; on a device the constant is False and nothing is widened.
UPCAST_DOTS = interpreted()


class Spec(NamedTuple):
    """A kernel in one configuration, for compiling ahead of time."""

    name: str
    kernel: Any
    """The `triton.jit` function."""
    signature: dict[str, str]
    """Triton type of every argument that is no constant: `*bf16`, `i32`, `fp32`."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    """Of a thread, so that two programs share a multiprocessor; None: as the compiler likes."""
    default: bool = True
    """Whether the op runs this configuration unless told otherwise."""


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches inside go to the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded(n: int, least: int = 16) -> int:
    """The block of a dimension that is not divided: the next power of two."""
    return max(least, 1 << (n - 1).bit_length())
