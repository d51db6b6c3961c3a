"""The part of a model before a hook, run once for many passes that differ only after it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fastsae.data.hooks import HookPoint, layers_path
from fastsae.data.language_model import LanguageModel


class Replay:
    """Skips the layers before a hook in passes over tokens that another pass was recorded of.

    That is so where each layer reads the one before it and nothing earlier, which is found out by
    trying; of other models, and of hooks outside the layers, nothing is skipped.

    Args:
        tokens: to try it on; a context is enough.
    """

    def __init__(self, lm: LanguageModel, hook: HookPoint, tokens: Int[Tensor, "n L"]) -> None:
        path = layers_path(lm)
        below = re.match(rf"{re.escape(path)}\.(\d+)(\.|$)", hook.module_path)
        n = int(below[1]) if below else 0
        if below and not below[2] and hook.side == "output":
            n += 1  # the hooked layer too: its output is recorded before it is changed
        self._skipped: list[nn.Module] = [*lm.model.get_submodule(path).children()][:n]
        self._output: Any = None
        logits = lambda: lm.model(input_ids=tokens, use_cache=False).logits
        with torch.no_grad():
            with self.recorded():
                whole = logits()
            with self.replayed():
                again = logits()
        if not torch.equal(whole, again):
            self._skipped = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """What the last skipped layer gives in this context is what `replayed` goes on from."""

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._output = output

        handles = [layer.register_forward_hook(keep) for layer in self._skipped[-1:]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside this context the skipped layers give what was recorded, and compute nothing."""
        # Not by `setattr`, which modules that wrap another one pass on to it.
        own = [vars(layer).get("forward") for layer in self._skipped]
        for layer in self._skipped:
            vars(layer)["forward"] = lambda *_args, **_kwargs: self._output
        try:
            yield
        finally:
            for layer, forward in zip(self._skipped, own, strict=True):
                del vars(layer)["forward"]
                if forward is not None:  # somebody had put it there
                    vars(layer)["forward"] = forward
