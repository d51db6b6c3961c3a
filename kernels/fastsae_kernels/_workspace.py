"""The budget of temporary memory that the eager implementations keep to."""

from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_WORKSPACE = 256 << 20

_bytes = DEFAULT_WORKSPACE


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
    try:
        yield
    finally:
        _bytes = previous
