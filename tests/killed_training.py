"""Trains from shards twice: in peace, and in child processes that are killed at random moments.

python tests/killed_training.py ACTIVATIONS OUT KILLS SEED
"""

import sys
from pathlib import Path
from typing import Any

import torch

from fastsae.training.language_model_run import train_on_language_model
from fastsae.training.run_config import LanguageModelRun
from killed import until_it_gets_through


def train(activations: Path, out: Path, steps: int, **settings: Any) -> None:
    """A run, or the rest of one."""
    run = LanguageModelRun(
        out=out,
        activations=activations,
        hook="blocks.1.hook_mlp_out",
        tokens=64 * steps,
        batch_size=64,
        sae={"d_sae": 64, "k": 4},
        resume=(out / "run.json").exists(),
        device="cpu",
        **settings,
    )
    train_on_language_model(run)


if __name__ == "__main__":
    activations, out, kills, seed = sys.argv[1:]
    torch.set_num_threads(1)
    for name, n in (("whole", 0), ("killed", int(kills))):
        work = lambda name=name: train(Path(activations), Path(out) / name, 400, checkpoints=100)
        until_it_gets_through(work, n, int(seed), (0.05, 1.0))
