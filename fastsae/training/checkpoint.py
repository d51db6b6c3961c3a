"""A training run on disk: a folder a checkpoint, complete or absent."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.files import replacing
from fastsae.saes import SAE
from fastsae.training.memory_order import restore_memory_order

if TYPE_CHECKING:
    from fastsae.training.trainer import Trainer

TENSORS = "trainer_state.safetensors"
STATE = "trainer_state.json"


def save_checkpoint(trainer: "Trainer", folder: Path) -> Path:
    """Write `folder/step-N`: the SAE in SAELens's format, the optimizer and the counters."""
    path = folder / f"step-{trainer.steps_done:09d}"
    if path.exists():  # of the same bits: it was resumed from, or written just before
        return path
    tensors = {f"dead.{name}": t for name, t in trainer.dead.state_dict().items()}
    tensors |= {f"scaling.{name}": t for name, t in trainer.scaling.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        state = trainer.optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    state = {
        "steps_done": trainer.steps_done,
        "training_seconds": trainer.training_seconds,
        "config": _config(trainer),
    }
    for left_by_a_kill in folder.glob(".step-*"):
        shutil.rmtree(left_by_a_kill)
    with replacing(path) as temporary:
        temporary.mkdir()
        trainer.sae.save_model(temporary)
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state, indent=2))
    every = trainer.cfg.keep_every
    for old in _checkpoints(folder)[: -trainer.cfg.keep_checkpoints]:
        if every is None or int(old.name.removeprefix("step-")) % every:
            shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(trainer: "Trainer", path: Path) -> None:
    """Continue `trainer` from a checkpoint, to the same bits as a run that was never stopped.

    Raises:
        FileNotFoundError: a file of the checkpoint is absent.
        ValueError: a file is damaged, or the run's configuration differs (the fields are named).
    """
    for name in (STATE, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"path must be a checkpoint with {name}, got {path}")
    try:
        state = json.loads((path / STATE).read_text())
        tensors = load_file(path / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    ours, theirs = _config(trainer), state["config"]
    changed = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    if changed:
        listing = "; ".join(f"{k}: {theirs.get(k)!r} then, {ours.get(k)!r} now" for k in changed)
        raise ValueError(
            f"config must be the checkpoint's to resume, got other values of {listing}"
        )
    saved = SAE.load_from_disk(path, device=trainer.device)
    trainer.sae.load_state_dict(saved.state_dict())
    trainer.copy_weights()
    for name, parameter in trainer.sae.named_parameters():
        prefix = f"optimizer.{name}."
        trainer.optimizer.state[parameter] = {
            key.removeprefix(prefix): _optimizer_state(trainer, parameter, tensor)
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    for prefix, part in (("dead.", trainer.dead), ("scaling.", trainer.scaling)):
        part.load_state_dict(
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        )
    trainer.steps_done = state["steps_done"]
    trainer.training_seconds = state["training_seconds"]


def _optimizer_state(trainer: "Trainer", parameter: Tensor, saved: Tensor) -> Tensor:
    """One tensor of a parameter's state, where and how its optimizer keeps it."""
    if saved.shape == parameter.shape:
        return restore_memory_order(parameter, saved)
    at_home = saved.ndim > 0 or trainer.optimizer.counts_on_device
    return saved.to(parameter.device if at_home else "cpu")


def _config(trainer: "Trainer") -> dict[str, object]:
    """What a resumed run must share: everything but how often it logs and saves."""
    values = asdict(trainer.cfg) | {"architecture": trainer.cfg.sae.architecture}
    free = ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "checkpoint_at_end")
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in free}))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []
