"""Seconds of a training run without its evaluations, and what those found."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOOK_ROWS = 4096
"""Held-out rows of an evaluation on the way."""
Curve = list[tuple[float, float]]
"""Seconds and held-out FVU."""


@dataclass
class Clock:
    curve: Curve = field(default_factory=list)
    _before: float = 0.0
    _started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._before, self._started = self.seconds, None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


@torch.no_grad()
def held_out_fvu(forward: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Of the first `LOOK_ROWS` rows [N, D]."""
    x = rows[:LOOK_ROWS]
    return float((forward(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def seconds_to(curve: Curve, fvu: float) -> float | None:
    """Training seconds after which the curve is at or under `fvu`."""
    return next((seconds for seconds, value in curve if value <= fvu), None)


def fvu_at(curve: Curve, seconds: float) -> float | None:
    """The last FVU of the curve by then."""
    return next((value for at, value in reversed(curve) if at <= seconds), None)
