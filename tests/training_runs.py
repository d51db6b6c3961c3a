"""A training run of a second, and all the bits that its next step depends on."""

from typing import Any

import torch

from fastsae import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    StandardConfig,
    TopKConfig,
    TrainConfig,
)
from fastsae.data.batches import ShuffledRows
from fastsae.training.log import read_log

D, F, K, B = 16, 128, 4, 64
CLOCK = ("seconds", "tokens_per_second")
KINDS = ("row_adam", "adam")


def sparse_rows(n=1000, seed=0):
    """Rows made of a few of 40 directions, off centre."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=g)
    strengths = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.08)
    return 5 * strengths @ directions + 0.01 * torch.randn(n, D, generator=g) + 2


def topk_config(**changes):
    shape = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
    return TopKConfig(**{**shape, "k": K, **changes})


def standard_config(**changes):
    shape = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
    return StandardConfig(**{**shape, "l1_coefficient": 0.5, **changes})


def config(steps=60, kind="row_adam", sae=None, optimizer=None, **changes: Any):
    """data, optimizer, schedule, log and checkpoint are what differs in those parts."""
    values = {
        "sae": sae or topk_config(),
        "data": DataConfig(
            **{"total_tokens": steps * B, "batch_size": B, **changes.pop("data", {})}
        ),
        "dead_window": 10 * B,
        "optimizer": OptimizerConfig(**{"kind": kind, "lr": 3e-3, **(optimizer or {})}),
        "schedule": ScheduleConfig(**changes.pop("schedule", {})),
        "log": LogConfig(**{"every": 7, **changes.pop("log", {})}),
        "checkpoint": CheckpointConfig(**changes.pop("checkpoint", {})),
    }
    return TrainConfig(**{**values, **changes})


def train(trainer, stop_before=None):
    """Go on from where the trainer is; the export, or None where it stopped before a step."""

    def batches():
        for step, x in enumerate(ROWS.from_step(trainer.steps_done), trainer.steps_done):
            if step == stop_before:
                raise KeyboardInterrupt
            yield x

    try:
        return trainer.fit(batches(), sample=ROWS.rows)
    except KeyboardInterrupt:
        return None


def state(trainer):
    """Every tensor and number that the next step depends on."""
    found = {name: t.detach().clone() for name, t in trainer.sae.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    found |= {f"dead.{name}": t for name, t in trainer.dead.state_dict().items()}
    return found | trainer.scaling.state_dict() | {"steps_done": torch.tensor(trainer.steps_done)}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert different == []


def timeless(path):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(path)]


ROWS = ShuffledRows(sparse_rows(), B, seed=3)
