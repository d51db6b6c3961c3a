"""SAELens's own folder, whatever its version."""

from pathlib import Path

from fastsae.interop.checkpoint import Checkpoint
from fastsae.saes.native_format import CONFIG, WEIGHTS, build_sae, read_checkpoint, write_sae


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    return Checkpoint(*read_checkpoint(path))


def write(made: Checkpoint, path: Path) -> None:
    write_sae(build_sae(*made, device="cpu", source="the checkpoint"), path)
