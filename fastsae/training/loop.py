"""Steps over one stream of batches, of one SAE or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.distributed.watch import watched
from fastsae.training.checkpoint import (
    latest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from fastsae.training.interruption import Interrupted, stop_requested

if TYPE_CHECKING:
    from fastsae.training.trainer import Batch, Sample, Trainer

Progress = Callable[[str, dict[str, Any]], None]
"""Called with the name of an SAE and each line of its log."""


def fit_together(
    trainers: Mapping[str, Trainer],
    batches: Iterable[Batch | Mapping[str, Batch]],
    sample: Sample | Mapping[str, Sample] | None,
    progress: Progress | None,
) -> None:
    """Step every trainer on every batch until the run's tokens are used up.

    A batch, or the sample, is for all of them, or a mapping holds one for each name. All are saved
    before a checkpoint of any is removed, so that there is always one that all have.

    Raises:
        ValueError, FileExistsError, Interrupted: as in `Trainer.fit`.
    """
    one = next(iter(trainers.values()))
    _refuse_other_runs(trainers.values())
    with ExitStack() as stack:
        stopped = lambda: False
        if one.out is not None:
            stopped = stack.enter_context(stop_requested())
        stack.enter_context(watched(one.mesh, lambda: one.steps_done))
        for trainer in trainers.values():
            stack.enter_context(trainer.tracked())
        iterator, asked_to_stop = iter(batches), False
        while one.steps_done < one.cfg.total_steps:
            batch = next(iterator, None)
            if batch is None:
                raise ValueError(
                    f"batches must last for {one.cfg.total_steps} steps, got {one.steps_done}"
                )
            for name, trainer in trainers.items():
                trainer.advance(_of(batch, name), None if sample is None else _of(sample, name))
                if progress is not None and trainer.is_logged(trainer.steps_done):
                    progress(name, trainer.metrics)
            if one.is_saved(one.steps_done):
                save_together(trainers.values())
            if one.mesh.size == 1 or one.is_logged(one.steps_done):  # when all processes ask
                asked_to_stop = one.mesh.any(stopped())
            if asked_to_stop:
                for trainer in trainers.values():
                    trainer.check_loss()
                where = ", ".join(str(path) for path in save_together(trainers.values()))
                settle(trainers.values())
                raise Interrupted(f"stopped after step {one.steps_done}, saved in {where}")
        if one.out is not None and one.cfg.checkpoint.at_end:
            save_together(trainers.values())
        settle(trainers.values())


def settle(trainers: Iterable[Trainer]) -> None:
    """Wait until what several processes saved is on disk; then older ones are removed."""
    behind = [trainer for trainer in trainers if trainer.saves is not None]
    for trainer in behind:
        trainer.settle()
    for trainer in behind:
        if trainer.out is not None:
            folder, cfg = trainer.out / "checkpoints", trainer.cfg
            trainer.mesh.on_first(partial(remove_old_checkpoints, folder, cfg))


def save_together(trainers: Iterable[Trainer]) -> list[Path]:
    """A checkpoint of each; then older ones than are kept are removed."""
    trainers = list(trainers)
    settle(trainers)
    saved = [(trainer, save_checkpoint(trainer)) for trainer in trainers]
    for trainer, path in saved:
        if trainer.saves is None:
            remove_old_checkpoints(path.parent, trainer.cfg)
    return [path for _, path in saved]


def _of(batch: Any, name: str) -> Any:
    """What is for an SAE of a batch, or of a sample."""
    return batch[name] if isinstance(batch, Mapping) else batch


def _refuse_other_runs(trainers: Iterable[Trainer]) -> None:
    for trainer in trainers:
        if trainer.out is not None and trainer.steps_done == 0:
            earlier = latest_checkpoint(trainer.out / "checkpoints")
            if earlier is not None:
                raise FileExistsError(
                    f"out must be a folder without checkpoints, got {earlier}; continue that run "
                    "with resume() or choose another folder"
                )
