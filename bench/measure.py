"""Times of several rivals, interleaved, and peak memory: of a CPU process or of a GPU."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch

Run = Callable[[], object]

OUT_OF_MEMORY = "out of memory"
"""What a row says that was not timed for it."""
FIRST_STEP, THIRD_STEP = 1e-4, 1e-2  # relative difference of the loss
HALF_STEP = 2e-2
"""Of the first loss, where one of the two computes in half precision."""
FLUSH_BYTES = 1 << 30
MORE_TURNS = 5
"""Times as many turns as were asked for are the most, where runs are short."""


def interleaved(
    runs: Mapping[str, Run],
    repeats: int,
    warm_up: int = 1,
    device: str = "cpu",
    least_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a drift of the machine meets all of them.

    In another order each turn: what ran before leaves its caches, its heat and its clocks behind.
    Short runs take more turns than `repeats`, until all have taken `least_seconds`.
    """
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    once = _on_gpu if device == "cuda" else _on_cpu
    order, turns = list(runs), random.Random(seed)
    for turn in range(MORE_TURNS * repeats):
        if turn >= repeats and sum(map(sum, seconds.values())) >= least_seconds:
            break
        turns.shuffle(order)
        for name in order:
            seconds[name].append(once(runs[name]))
    return seconds


def _on_cpu(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _on_gpu(run: Run) -> float:
    """Device time between two events.

    Overwriting a gigabyte twice first puts everything out of the L2 cache, and keeps the device
    busy for half a millisecond, in which the host queues the launches: gaps between them count only
    as far as they are longer.
    """
    torch.cuda.synchronize()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    flush.zero_()
    start.record()
    made = run()
    stop.record()
    torch.cuda.synchronize()
    del made
    return start.elapsed_time(stop) / 1e3


def in_a_row(run: Run, calls: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of a GPU's steps that follow one another, as in training."""
    for _ in range(warm_up):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(events)]


def launches(run: Run, calls: int = 3) -> dict[str, float]:
    """Milliseconds a call of each kernel that a GPU runs, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        for _ in range(calls):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in seen.key_averages():
        ms = event.self_device_time_total / 1e3 / calls
        if event.device_type.name == "CUDA":
            times[event.key] = times.get(event.key, 0.0) + ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def out_of_memory(failure: BaseException) -> bool:
    """Whether it says that memory could not be had, of a GPU or of the host."""
    return isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(failure, RuntimeError) and "can't allocate memory" in str(failure)
    )


def why(failure: BaseException) -> str:
    """What a row says of a provider that was not timed for it."""
    if out_of_memory(failure):
        return OUT_OF_MEMORY
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"


def differs(losses: list[float], anchor: list[float], device: str) -> str | None:
    """What a row says of a first or third loss too far from the anchor's; None of like ones."""
    first = FIRST_STEP if device == "cpu" else HALF_STEP
    apart = [abs(a / b - 1) for a, b in zip(losses, anchor, strict=True)]
    # "Not at or under" rather than "above": NaN is a difference.
    if apart[0] <= first and apart[2] <= max(first, THIRD_STEP):
        return None
    return (
        f"parity: mse {losses[0]:.6g} and {losses[2]:.6g}, not {anchor[0]:.6g} and {anchor[2]:.6g}"
    )


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: p20, median, p80."""
    ordered = sorted(seconds)
    at = lambda q: round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3)
    return {
        "ms_p20": at(0.2),
        "ms_p50": round(1e3 * statistics.median(ordered), 3),
        "ms_p80": at(0.8),
    }


def times_as_long(seconds: list[float], others: list[float]) -> float:
    """Median ratio of what was taken in the same turns: a drift between turns meets both."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def peak_extra_bytes(run: Run, device: str = "cpu") -> int:
    """Bytes of memory that `run` needs at its peak beyond what is held before it.

    On a GPU the allocator's count. On Linux the process's resident peak, which the kernel resets
    on request and which also counts what libraries allocate for themselves.

    Raises:
        OSError: neither can be had.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) * 1024


def peak_mib(run: Run, device: str = "cpu") -> dict[str, float]:
    """What a row says of it, in MiB; nothing on a system that does not tell."""
    try:
        return {"peak_mib": round(peak_extra_bytes(run, device) / 2**20, 1)}
    except OSError:
        return {}


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must state {name}")
