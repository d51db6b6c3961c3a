"""A checkpoint of a run of ours: its SAE as it is used, the scale of the rows folded in."""

from pathlib import Path

from fastsae.interop.checkpoint import Checkpoint
from fastsae.training.checkpoint import STATE, load_as_used


def matches(path: Path) -> bool:
    return (path / STATE).is_file()


def read(path: Path) -> Checkpoint:
    sae = load_as_used(path)
    return Checkpoint(sae.cfg.to_dict(), sae.state_dict())
