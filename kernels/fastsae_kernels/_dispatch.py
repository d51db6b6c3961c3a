"""Which implementation of an op runs."""

from collections.abc import Collection
from enum import Enum

import torch


class Impl(str, Enum):
    """`auto` decides by device at each call; any other choice runs as asked or raises."""

    AUTO = "auto"
    TRITON = "triton"
    EAGER = "eager"
    REFERENCE = "reference"


def resolve_impl(
    impl: Impl | str,
    device: torch.device,
    available: Collection[Impl] = (Impl.EAGER, Impl.REFERENCE),
) -> Impl:
    """The implementation that runs: never `AUTO`, and never another than the one asked for.

    Raises:
        ValueError: `impl` is not an `Impl`.
        RuntimeError: the op has no such implementation.
    """
    names = [choice.value for choice in Impl]
    if str(getattr(impl, "value", impl)) not in names:
        raise ValueError(f"impl must be one of {names}, got {impl!r}")
    impl = Impl(impl)
    if impl is Impl.AUTO:
        on_gpu = device.type == "cuda" and Impl.TRITON in available
        return Impl.TRITON if on_gpu else Impl.EAGER
    if impl not in available:
        have = [choice.value for choice in available]
        raise RuntimeError(
            f"impl must be one of {have} for this op, got {impl.value!r}; impl='auto' always runs"
        )
    return impl
