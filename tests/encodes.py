"""What the tests of several encodes share."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity import weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ids = lambda d: str(d).removeprefix("torch.")


def from_sae_lens(path: str, *names: str) -> dict[str, Any]:
    """Definitions of an installed SAELens, run by themselves: importing all of it takes long."""
    found = importlib.util.find_spec("sae_lens")
    if found is None or found.origin is None:
        pytest.skip("the `peers` extra is absent")
    tree = ast.parse((Path(found.origin).parent / path).read_text())
    tree.body = [n for n in tree.body if getattr(n, "name", None) in names]
    namespace: dict[str, Any] = {"torch": torch, "nn": torch.nn, "Any": Any}
    exec(compile(tree, path, "exec"), namespace)
    return namespace


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.n = max(self.n, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def mixed(values):
    """A sum whose gradient tells the entries apart."""
    mix = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64, device=values.device)
    return (values * mix.view_as(values)).sum()


def fp32(shape):
    return {k: v.float() for k, v in weights(shape).items()}


def encoder(inputs, *more) -> Any:
    return [inputs[k] for k in ("x", "W_enc", "b_enc", *more)]


def parts_of(code):
    return {"row_offsets": code.row_offsets, "indices": code.indices, "code_acts": code.acts}
