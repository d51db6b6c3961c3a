"""What comes next, made on another thread while this one works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar, cast

import torch

T = TypeVar("T")


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


class Prefetched(Iterator[T], Generic[T]):
    """The items of an iterator in their order, up to `depth` of them made ahead of their use.

    An error of the iterator is raised where its item would have come. The thread ends with the
    iterator, and at `close`.

    Args:
        depth: items made ahead; 0: none, and no thread.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        if depth < 0:
            raise ValueError(f"depth must be at least 0, got {depth}")
        self._items, self._closed = items, threading.Event()
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        # A thread begins on device 0, whichever its maker is on.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._ahead = depth > 0
        if self._ahead:
            self._thread.start()

    def __next__(self) -> T:
        if not self._ahead:
            return next(self._items)
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if item is _END or isinstance(item, _Failed):
            self.close()
            if isinstance(item, _Failed):
                raise item.error
            raise StopIteration
        return cast(T, item)

    def close(self) -> None:
        """End the thread; what was made ahead is dropped."""
        self._closed.set()
        if self._ahead and self._thread is not threading.current_thread():
            with suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._thread.join()

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        last: object = _END
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            last = _Failed(error)
        self._put(last)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False
