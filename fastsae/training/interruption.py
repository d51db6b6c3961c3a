"""SIGINT and SIGTERM: the step is finished and saved before a run ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 75
"""Of a command that was asked to stop, saved, and can be resumed: EX_TEMPFAIL."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was asked to stop; it has saved a checkpoint to resume from."""


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Inside this context the first SIGINT or SIGTERM only makes the function true.

    A second one acts as it did before. Other threads than the main one cannot listen: there the
    function stays false and signals act as always.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield lambda: bool(received)
    finally:
        restore()
