"""A training run on disk: a folder a checkpoint, complete or absent."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.distributed.assembly import by_latent, part_of_latents, shard_of
from fastsae.files import replacing
from fastsae.saes import SAE
from fastsae.training.config import TrainConfig
from fastsae.training.memory_order import restore_memory_order
from fastsae.training.optimizer import DICTIONARY
from fastsae.training.scaling import build_scaling

if TYPE_CHECKING:
    from fastsae.training.trainer import Trainer

T = TypeVar("T")

TENSORS = "trainer_state.safetensors"
STATE = "trainer_state.json"
SHARDS = ".metadata"
"""Of a checkpoint of several processes; see `sharded_checkpoint`, whose imports take a second."""
FREE = ("exchange", "log", "checkpoint")
"""Fields of a run that may change when it is resumed: they do not touch its bits."""


def save_checkpoint(trainer: "Trainer") -> Path:
    """Write `out/checkpoints/step-N`: the SAE in SAELens's format, optimizer and counters."""
    if trainer.out is None:
        raise ValueError("out must be a folder to save a checkpoint, got None")
    if trainer.steps_done == 0:
        raise ValueError("steps_done must be at least 1 to save a checkpoint, got 0")
    folder = trainer.out / "checkpoints"
    path = _path(folder, trainer.steps_done)
    if trainer.saves is not None:
        trainer.saves.wait()
    if trainer.mesh.on_first(path.exists):  # of the same bits: resumed from, or written just before
        return path
    state = {
        "steps_done": trainer.steps_done,
        "training_seconds": trainer.training_seconds,
        "config": _config(trainer),
    }
    if trainer.saves is not None:
        from fastsae.training.sharded_checkpoint import tensors_of

        trainer.saves.start(
            tensors_of(trainer),
            state,
            path,
        )
        return path
    tensors = {f"dead.{name}": t for name, t in trainer.dead.state_dict().items()}
    tensors |= {f"scaling.{name}": t for name, t in trainer.scaling.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        kept = trainer.optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
    for left_by_a_kill in folder.glob(".step-*"):
        shutil.rmtree(left_by_a_kill)
    with replacing(path) as temporary:
        temporary.mkdir()
        trainer.sae.save_model(temporary)
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state, indent=2))
    return path


def remove_old_checkpoints(folder: Path, cfg: TrainConfig) -> None:
    """Keep the newest ones and those at multiples of `keep_every` steps."""
    kept = cfg.checkpoint
    for step in checkpoint_steps(folder)[: -kept.keep]:
        if kept.keep_every is None or step % kept.keep_every:
            remove_checkpoint(folder, step)


def remove_checkpoint(folder: Path, step: int) -> None:
    """Take it off in one rename, so that a kill leaves no half of it."""
    gone = folder / f".{_path(folder, step).name}.removed"
    _path(folder, step).rename(gone)
    shutil.rmtree(gone)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps there are checkpoints of, ascending."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted(int(path.name.removeprefix("step-")) for path in found if path.is_dir())


def latest_checkpoint(folder: Path) -> Path | None:
    steps = checkpoint_steps(folder)
    return _path(folder, steps[-1]) if steps else None


def load_checkpoint(trainer: "Trainer", path: Path) -> None:
    """Continue `trainer` from a checkpoint, to the same bits as a run that was never stopped.

    Raises:
        FileNotFoundError: a file of the checkpoint is absent.
        ValueError: a file is damaged, or the run's configuration differs (the fields are named).
    """
    sharded = (path / SHARDS).is_file()
    for name in (STATE, SHARDS if sharded else TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"path must be a checkpoint with {name}, got {path}")
    try:
        state = json.loads((path / STATE).read_text())
        tensors = {} if sharded else load_file(path / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    ours, theirs = (dict(_by_field(cfg)) for cfg in (_config(trainer), state["config"]))
    changed = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    if changed:
        listing = "; ".join(f"{k}: {theirs.get(k)!r} then, {ours.get(k)!r} now" for k in changed)
        raise ValueError(
            f"config must be the checkpoint's to resume, got other values of {listing}"
        )
    if sharded:
        from fastsae.training.sharded_checkpoint import load

        load(trainer, path)
    else:
        _load_whole(trainer, path, tensors)
    trainer.copy_weights()
    trainer.steps_done = state["steps_done"]
    trainer.training_seconds = state["training_seconds"]


def load_as_used(path: Path) -> SAE:
    """The SAE of a checkpoint, as the run would have exported it there.

    Raises:
        ValueError: a file is damaged, or the checkpoint is one of several processes.
    """
    if not (path / TENSORS).is_file():
        raise ValueError(
            f"path must be a checkpoint with {TENSORS}, got {path}, which several processes wrote; "
            "resume the run, or use the folder sae that it ends with"
        )
    sae = SAE.load_from_disk(path)
    scaling = build_scaling(sae.cfg.normalize_activations)
    try:
        scaling.load_state_dict(under("scaling.", load_file(path / TENSORS)))
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return scaling.as_used(sae)


def _load_whole(trainer: "Trainer", path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint of one process; each of several takes its part."""
    sae = trainer.sae
    saved = SAE.load_from_disk(path, device=trainer.device if sae.shards is None else "cpu")
    sae.load_state_dict(shard_of(sae, saved.state_dict()))
    for name, parameter in sae.named_parameters():
        trainer.optimizer.state[parameter] = {
            key: _optimizer_state(trainer, name, parameter, tensor)
            for key, tensor in under(f"optimizer.{name}.", tensors).items()
        }
    counters = under("dead.", tensors)
    trainer.dead.load_state_dict({k: part_of_latents(sae, "b_enc", t) for k, t in counters.items()})
    trainer.scaling.load_state_dict(under("scaling.", tensors))


def under(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Those whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def owns_rows(trainer: "Trainer", name: str) -> bool:
    """Whether a parameter's state here is that of the rows that this process updates only."""
    return name in DICTIONARY and trainer.parts.splits_rows


def _optimizer_state(trainer: "Trainer", name: str, parameter: Tensor, saved: Tensor) -> Tensor:
    """One tensor of a parameter's state, where and how its optimizer keeps it."""
    saved = part_of_latents(trainer.sae, name, saved)
    if saved.ndim and owns_rows(trainer, name):
        rows = by_latent(name, saved)
        mine = rows[trainer.parts.owned(len(rows))]
        return mine.clone(memory_format=torch.contiguous_format).to(parameter.device)
    if saved.shape == parameter.shape:
        return restore_memory_order(parameter, saved)
    at_home = saved.ndim > 0 or trainer.optimizer.counts_on_device
    return saved.to(parameter.device if at_home else "cpu", copy=True)


def _config(trainer: "Trainer") -> dict[str, object]:
    """What a resumed run must share: everything but how often it logs and saves."""
    values = asdict(trainer.cfg) | {"architecture": trainer.cfg.sae.architecture}
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in FREE}))


def _by_field(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Each value with its name, such as `data.batch_size`."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _by_field(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"
