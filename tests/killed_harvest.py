"""Harvests in a child process that is killed at moments drawn at random, until one gets through.

python tests/killed_harvest.py MODEL TEXT OUT KILLS SEED

OUT/whole is what it leaves that is never killed, OUT/killed the other.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastsae.data import load_language_model
from fastsae.data.harvest_run import HarvestRun, harvest_to_disk
from killed import until_it_gets_through


def main(model: str, text: str, out: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    lm = load_language_model(model)
    run = HarvestRun(
        out=Path(out) / "killed",
        model=model,
        dataset=text,
        hooks=("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"),
        context_size=32,
        tokens=40_000,
        eval_tokens=2000,
        shard_mib=1,
        batch_contexts=16,
    )
    until_it_gets_through(lambda: harvest_to_disk(run, lm=lm), kills, seed, (0.02, 0.15))
    harvest_to_disk(replace(run, out=Path(out) / "whole"), lm=lm)


if __name__ == "__main__":
    model, text, out, kills, seed = sys.argv[1:]
    main(model, text, out, int(kills), int(seed))
