"""Harvests in a child process that is killed at moments drawn at random, until one gets through.

python tests/killed_harvest.py MODEL TEXT OUT KILLS SEED
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastsae.data import load_language_model
from fastsae.data.harvest_run import HarvestRun, harvest_to_disk


def main(model: str, text: str, out: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    lm = load_language_model(model)
    run = HarvestRun(
        out=Path(out),
        model=model,
        dataset=text,
        hooks=("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"),
        context_size=32,
        tokens=40_000,
        eval_tokens=2000,
        shard_mib=1,
        batch_contexts=16,
    )
    draw = random.Random(seed)
    done = 0
    while True:
        child = os.fork()
        if child == 0:
            harvest_to_disk(run, lm=lm)
            os._exit(0)
        if done < kills:
            time.sleep(draw.uniform(0.02, 0.15))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif done >= kills or os.WEXITSTATUS(status):
            print("kills", done, "status", status)  # noqa: T201
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    model, text, out, kills, seed = sys.argv[1:]
    main(model, text, out, int(kills), int(seed))
