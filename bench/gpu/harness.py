"""What the parts share: where they run, how large, what they report, and random weights.

Without a GPU everything runs in miniature in Triton's interpreter, so that a typing error is found
there. Nothing is timed then and nothing is written.
"""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case
from bench.measure import Run, in_a_row, interleaved, launches, peak_extra_bytes
from bench.record import append

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY = DEVICE == "cpu"
if DRY:
    os.environ.setdefault("TRITON_INTERPRET", "1")

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """The sizes of every part."""

    parity: Case
    ops: tuple[Case, ...]
    encode: tuple[Case, ...]
    steps: tuple[Case, ...]
    peers: Case
    memory: Case
    wide: Case
    """Its weights have more than 2^31 elements."""
    tall: Case
    """Its rows times groups of 64 latents are more than 2^31."""
    long: Case
    """Its rows times columns are more than 2^31."""
    training: Case
    """On the sample of real rows."""
    training_steps: int
    repeats: int


def _with(case: Case, k: int) -> Case:
    return replace(case, name=f"{case.name}-k{k}", K=k)


_MID = CASES["gemma-2-2b-131k"]
FULL = Scale(
    parity=Case("parity", 4096, 768, 131_072, 64),
    ops=(_MID, CASES["gpt2-small-131k"]),
    encode=(
        CASES["gpt2-small-131k"],
        _MID,
        CASES["llama-3.1-8b-131k"],
        _with(_MID, 32),
        _with(_MID, 128),
    ),
    steps=(
        CASES["gpt2-small-131k"],
        _MID,
        CASES["llama-3.1-8b-131k"],
        CASES["llama-3.1-8b-1m"],
    ),
    peers=CASES["gpt2-small-24k"],
    memory=_MID,
    wide=Case("wide", 64, 4096, 600_064, 64),
    tall=Case("tall", 139_264, 64, 1_048_576, 32),
    long=Case("long", 530_000, 4096, 4096, 4),
    training=Case("smollm2-135m-16k", 2048, 576, 16_384, 32),
    training_steps=100,
    repeats=15,
)
_TINY = Case("tiny", 5, 24, 128, 2)
QUICK = Scale(
    parity=_TINY,
    ops=(_TINY,),
    encode=(_TINY,),
    steps=(_TINY,),
    peers=_TINY,
    memory=_TINY,
    wide=_TINY,
    tall=_TINY,
    long=_TINY,
    training=Case("tiny-real", 4, 576, 128, 2),
    training_steps=1,
    repeats=1,
)


@dataclass
class Report:
    """Prints what a part finds as it comes, and appends it to a file."""

    part: str
    budget: float
    out: Path | None = None
    failures: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of the part's budget that remain."""
        return self.budget - (time.monotonic() - self._started)

    def note(self, text: str) -> None:
        print(f"[{self.part}] {text}", flush=True)

    def check(self, name: str, passed: bool, **facts: Any) -> None:
        shown = ", ".join(f"{k} {_short(v)}" for k, v in facts.items())
        self.note(f"{'ok  ' if passed else 'FAIL'} {name}{': ' if shown else ''}{shown}")
        if not passed:
            self.failures.append(name)
        self._write({"bench": "gpu_check", "check": name, "passed": passed, **facts})

    def measured(self, row: Row, text: str) -> None:
        """A row with times in it: neither shown nor kept where nothing is timed."""
        if not DRY:
            self.note(text)
            self._write({"part": self.part, **row})

    def enough_time(self, seconds: float, for_what: str) -> bool:
        enough = self.left() >= seconds
        if not enough:
            self.note(f"left out for want of time: {for_what}")
        return enough

    def _write(self, row: Row) -> None:
        if not DRY:
            append(self.out or "gpu", [row])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seconds_of(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Of each turn; ones where nothing is timed."""
    if DRY:
        for run in runs.values():
            run()
        return {name: [1.0] for name in runs}
    return interleaved(runs, repeats, warm_up=2, device="cuda")


def step_seconds(run: Run, calls: int) -> list[float]:
    """Of each call; a one where nothing is timed."""
    if DRY:
        run()
        return [1.0]
    return in_a_row(run, calls)


def kernels_of(run: Run) -> dict[str, float]:
    """Milliseconds of each kernel of a run; none if the profiler does not work here."""
    if DRY:
        return launches(lambda: torch.ones(2) + 1, calls=1)
    try:
        return launches(run)
    except RuntimeError as failure:
        print(f"no times of single launches: {failure}")
        return {}


def peak_bytes(run: Run) -> int:
    if DRY:
        run()
        return 0
    return peak_extra_bytes(run, "cuda")


def free_memory() -> None:
    if not DRY:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def gibibytes() -> float:
    """Of GPU memory that could be allocated now."""
    return 2.0**40 if DRY else torch.cuda.mem_get_info()[0] / 2**30


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=generator(seed))


def dictionary(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[n, d] random rows of norm one, made in place."""
    rows = normal(n, d, seed=seed, dtype=dtype)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def rough(found: Tensor, exact: Tensor) -> float:
    """Relative error max|a - b| / max|b|; infinite where anything is no number."""
    if found.numel() == 0:
        return 0.0
    error = (found.double() - exact.double()).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")
