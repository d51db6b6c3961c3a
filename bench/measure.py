"""Times of several rivals, interleaved, and peak memory of a whole process."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]


def interleaved(runs: dict[str, Run], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: p20, median, p80."""
    ordered = sorted(seconds)
    at = lambda q: round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3)
    return {
        "ms_p20": at(0.2),
        "ms_p50": round(1e3 * statistics.median(ordered), 3),
        "ms_p80": at(0.8),
    }


def peak_extra_bytes(run: Run) -> int:
    """Bytes of memory that `run` needs at its peak beyond what is held before it.

    On a GPU the allocator's count. On Linux the process's resident peak, which the kernel resets
    on request and which also counts what libraries allocate for themselves.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        raise RuntimeError("device must be CUDA or the system Linux to measure memory")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) * 1024


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must state {name}")
