"""Trains from shards in a child process that is killed at random moments, until one gets through.

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


def main(activations: str, out: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    done = 0
    while True:
        child = os.fork()
        if child == 0:
            train_on_language_model(
                LanguageModelRun(
                    out=Path(out),
                    activations=Path(activations),
                    hook="blocks.1.hook_mlp_out",
                    tokens=64 * 400,
                    batch_size=64,
                    sae={"d_sae": 64, "k": 4},
                    checkpoints=100,
                    resume=(Path(out) / "run.json").exists(),
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
        elif done >= kills or os.WEXITSTATUS(status):
            print("kills", done, "status", status)  # noqa: T201
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    activations, out, kills, seed = sys.argv[1:]
    main(activations, out, int(kills), int(seed))
