"""dictionary_learning's TopKTrainer."""

import importlib
import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step, half, quiet


def dictionary_learning_step(start: Start) -> Step:
    """From its second step on: the first sets b_dec."""
    case = start.case
    trainer = _top_k_trainers().TopKTrainer(
        steps=10**6,
        activation_dim=case.D,
        dict_size=case.F,
        k=case.K,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=0,
        device=str(start.device),
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(start.W_enc.t())
        trainer.ae.encoder.bias.copy_(start.b_enc)
        trainer.ae.decoder.weight.copy_(start.W_dec.t())
    steps = itertools.count(1)

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.num_tokens_since_fired.masked_fill_(start.dead, 2 * 10**7)
        x = x.bfloat16() if x.is_cuda else x  # as its training loop does
        with half(x):
            with torch.no_grad():  # for the parity check: its loss weights AuxK otherwise
                mse = None if start.dead is None else (trainer.ae(x) - x).square().sum(-1).mean()
            loss = trainer.update(next(steps), x)
        return float(loss if mse is None else mse)

    return step


def _top_k_trainers() -> Any:
    """The module without its package's `__init__`, which imports nnsight, which patches torch."""
    name = "dictionary_learning"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package = ModuleType(name)
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or [])
        sys.modules[name] = package
    with quiet():
        return importlib.import_module(f"{name}.trainers.top_k")
