"""What a rival is: a function from the weights that everybody starts from to a training step."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Start

LR = 3e-4
"""Of every provider's Adam."""

Step = Callable[[Tensor], float]
"""Trains on one batch [B, D] and returns the mean over its rows of the squared error summed over D,
from before the update: what parity is checked on."""


@dataclass(frozen=True)
class Provider:
    """Somebody's SAE in training: a TopK SAE of `start.case`, its optimizer, everything it counts.

    `build` copies `start.W_enc`, `start.W_dec` and `start.b_enc`, starts `b_dec` at zero, and ranks
    latents by activation times decoder norm (which is 1 at the start).
    """

    build: Callable[[Start], Step]
    module: str | None = None
    """What must be importable, or None."""
    install: str = ""
    """The command that installs it."""

    def missing(self) -> str | None:
        """How to install what is not installed; None if nothing is missing."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return self.install


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def half(x: Tensor) -> torch.autocast:
    """bf16 products on a GPU, as every library recommends there; no change on a CPU."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)
