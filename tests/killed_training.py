"""Trains from shards twice: in peace, and in child processes that are killed at random moments.

python tests/killed_training.py ACTIVATIONS OUT KILLS SEED
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastsae.training.language_model_run import LanguageModelRun, train_on_language_model


def train(activations: Path, out: Path, kills: int, seed: int) -> None:
    """Start over after each kill, until one gets through."""
    draw = random.Random(seed)
    done = 0
    while True:
        child = os.fork()
        if child == 0:
            train_on_language_model(
                LanguageModelRun(
                    out=out,
                    activations=activations,
                    hook="blocks.1.hook_mlp_out",
                    tokens=64 * 400,
                    batch_size=64,
                    sae={"d_sae": 64, "k": 4},
                    checkpoints=100,
                    resume=(out / "run.json").exists(),
                    device="cpu",
                )
            )
            os._exit(0)
        if done < kills:
            time.sleep(draw.uniform(0.05, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif os.WEXITSTATUS(status):
            sys.exit(os.WEXITSTATUS(status))
        elif done >= kills:
            return print("kills", done)  # noqa: T201


if __name__ == "__main__":
    activations, out, kills, seed = sys.argv[1:]
    torch.set_num_threads(1)
    for name, n in (("whole", 0), ("killed", int(kills))):
        train(Path(activations), Path(out) / name, n, int(seed))
