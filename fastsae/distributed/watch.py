"""Who is missing when a collective fails.

Every process says once a second how far it is, and why when it ends in an error of its own.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastsae.distributed.mesh import Mesh, run_store

BEAT_SECONDS = 1.0
SILENT_SECONDS = 3.5
"""Without a beat for so long, a process is taken for dead."""
OF_COLLECTIVES = ("gloo", "NCCL", "onnection", "imed out", "timeout", "process group")
"""What the messages of torch's errors have in common, where another process is the cause."""


class ProcessLost(RuntimeError):
    """Another process died or hangs; the message says which."""


@contextmanager
def watched(mesh: Mesh, step: Callable[[], int]) -> Iterator[None]:
    """Inside this context a collective that fails raises `ProcessLost`, which names the cause.

    That is so with gloo. NCCL ends the process itself after the time-out, and torchrun says which
    one failed first. Processes beside the mesh are watched too.

    Args:
        step: how far this process is.
    """
    if mesh.size + mesh.beside == 1:
        yield
        return
    beat = _Heartbeat(mesh, step)
    try:
        yield
    except Exception as error:
        message = str(error)
        of_collectives = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(t in message for t in OF_COLLECTIVES)
        )
        if not of_collectives:
            beat.last_words(f"{type(error).__name__}: {message}")
            raise
        first = message.strip().partition("\n")[0]
        raise ProcessLost(f"{beat.verdict()}; resume from the last checkpoint ({first})") from error
    finally:
        beat.stop()


class _Heartbeat:
    def __init__(self, mesh: Mesh, step: Callable[[], int]) -> None:
        self.mesh, self.step = mesh, step
        # A connection of its own: the default one is busy while a collective waits.
        self.store = run_store(timedelta(seconds=10))
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._beat()
            except RuntimeError:  # the store went with its process
                return

    def last_words(self, error: str) -> None:
        with suppress(RuntimeError):  # the store went with its process
            self._beat(error)

    def _beat(self, error: str | None = None) -> None:
        here = {"time": time.time(), "step": self.step(), "calls": self.mesh.calls}
        here |= {"pid": os.getpid(), "host": socket.gethostname(), "error": error}
        self.store.set(f"fastsae/{self.mesh.rank}", json.dumps(here))

    def verdict(self) -> str:
        """Who is silent, or else who is behind."""
        time.sleep(SILENT_SECONDS)
        beats: dict[int, dict[str, Any]] = {}
        try:
            for rank in range(self.mesh.size + self.mesh.beside):
                if self.store.check([f"fastsae/{rank}"]):  # else it did not begin
                    beats[rank] = json.loads(self.store.get(f"fastsae/{rank}"))
        except RuntimeError:
            return "rank 0, which keeps the store of the processes, is gone"
        now = time.time()
        ended = [f"{_named(r, b, now)}: {b['error']}" for r, b in beats.items() if b["error"]]
        if ended:
            return "ended in an error: " + ", then ".join(ended)
        longest_first = sorted(beats.items(), key=lambda item: item[1]["time"])
        limit = now - SILENT_SECONDS + BEAT_SECONDS / 2
        silent = [_named(rank, b, now) for rank, b in longest_first if b["time"] < limit]
        if silent:
            return "dead: " + ", then ".join(silent)
        members = {rank: beat for rank, beat in beats.items() if rank < self.mesh.size}
        if not members:
            return "the processes that train ended before their first step"
        last = min(b["calls"] for b in members.values())
        behind = {r: b for r, b in members.items() if b["calls"] == last}
        if len(behind) == len(members):
            return "all processes are alive and as far as each other, and one does not answer"
        return "behind: " + ", ".join(_named(r, b, now) for r, b in behind.items())


def _named(rank: int, beat: dict[str, Any], now: float) -> str:
    ago, place = now - beat["time"], f"pid {beat['pid']} on {beat['host']}"
    return f"rank {rank} ({place}), heard of {ago:.0f} s ago at step {beat['step']}"
