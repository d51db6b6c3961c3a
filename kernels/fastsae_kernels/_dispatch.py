"""Which implementation of an op runs."""

import importlib.util
import os
from collections.abc import Collection
from enum import Enum

import torch


class Impl(str, Enum):
    """`auto` decides by device at each call; any other choice runs as asked or raises."""

    AUTO = "auto"
    TRITON = "triton"
    EAGER = "eager"
    REFERENCE = "reference"


# Made here: torch.compile of torch 2.11 can trace neither going through an Enum nor calling it.
CHOICES = {choice.value: choice for choice in Impl}
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_impl(
    impl: Impl | str,
    device: torch.device,
    available: Collection[Impl] = (Impl.TRITON, Impl.EAGER, Impl.REFERENCE),
    dtypes: Collection[torch.dtype] = (),
) -> Impl:
    """The implementation that runs: never `AUTO`, and never another than the one asked for.

    Args:
        impl: what the caller asked for.
        device: where the op's tensors are.
        available: what the op has.
        dtypes: of the op's tensors; the kernels take no fp64.

    Raises:
        ValueError: `impl` is not an `Impl`.
        RuntimeError: the op has no such implementation, or it cannot run here.
        TypeError: the kernels were asked for and a tensor is fp64.
    """
    name = str(getattr(impl, "value", impl))
    if name not in CHOICES:
        raise ValueError(f"impl must be one of {list(CHOICES)}, got {impl!r}")
    impl = CHOICES[name]
    if impl is Impl.AUTO:
        kernels = Impl.TRITON in available and device.type == "cuda" and TRITON_INSTALLED
        return Impl.TRITON if kernels and torch.float64 not in dtypes else Impl.EAGER
    if impl not in available:
        have = [choice.value for choice in available]
        raise RuntimeError(
            f"impl must be one of {have} for this op, got {impl.value!r}; impl='auto' always runs"
        )
    if impl is Impl.TRITON:
        if not TRITON_INSTALLED:
            raise RuntimeError("impl='triton' needs the package triton; pip install triton")
        if device.type != "cuda" and not interpreted():
            raise RuntimeError(
                f"impl='triton' needs tensors on a GPU, got {device}; use impl='auto', or set "
                "TRITON_INTERPRET=1 before Python starts to run the kernels in the interpreter"
            )
        if torch.float64 in dtypes:
            raise TypeError(
                "impl='triton' takes float16, bfloat16 and float32, got float64; use impl='eager'"
            )
    return impl
