"""A harvest of a tiny model, and what is in its folder."""

from pathlib import Path
from typing import Any

import torch

from fastsae.data.harvest_run import HarvestRun
from fastsae.data.shards import ActivationShards

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")


def small_harvest(out: Path, model: str, stories: str, **settings: Any) -> HarvestRun:
    """3 shards in less than a second."""
    return HarvestRun(
        out=out,
        model=model,
        dataset=stories,
        hooks=HOOKS,
        context_size=32,
        tokens=20_000,
        eval_tokens=1000,
        shard_mib=1,
        batch_contexts=16,
        device="cpu",
        **settings,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows_of(folder: Path, hook: str) -> torch.Tensor:
    shards = ActivationShards(folder)
    return torch.cat([shards.rows(hook, i) for i in range(len(shards.index.shards))])
