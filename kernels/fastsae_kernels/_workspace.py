"""The budget of temporary memory that the eager implementations keep to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEFAULT_WORKSPACE = 256 << 20

_bytes = DEFAULT_WORKSPACE
_kept = threading.local()


def workspace_bytes() -> int:
    """Bytes an eager op may allocate besides its inputs, outputs and gradients."""
    return _bytes


@contextmanager
def workspace(budget: int) -> Iterator[None]:
    """Run eager ops with another budget of temporary memory, in bytes.

    Raises:
        ValueError: `budget` is under 1 MiB.
    """
    global _bytes
    if budget < 1 << 20:
        raise ValueError(f"budget must be at least 1 MiB (1048576 bytes), got {budget}")
    previous, _bytes = _bytes, budget
    release_scratch()
    try:
        yield
    finally:
        _bytes = previous
        release_scratch()


def scratch(n: int, like: Tensor) -> Tensor:
    """[n] uninitialised values of `like`'s dtype, overwritten by the next caller in this thread.

    Kept between calls on a CPU, where the page faults of a fresh buffer cost as much as a third of
    the product that is written into it; elsewhere torch's allocator keeps it.
    """
    if like.device.type != "cpu":
        return like.new_empty(n)
    held = getattr(_kept, "buffer", None)
    if held is None or held.dtype != like.dtype or held.numel() < n:
        _kept.buffer = None  # two of them would not fit into the workspace
        with torch.inference_mode(False):  # or training could not write into it later
            _kept.buffer = held = torch.empty(n, dtype=like.dtype)
    return held[:n]


def release_scratch() -> None:
    """Give the kept buffer back."""
    _kept.buffer = None
