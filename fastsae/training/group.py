"""Several SAEs side by side, from one stream of batches."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAE
from fastsae.training.checkpoint import checkpoint_steps, remove_checkpoint
from fastsae.training.config import TrainConfig
from fastsae.training.loop import fit_together
from fastsae.training.memory import MemoryPlan, explained
from fastsae.training.trainer import Batch, Sample, Trainer

SHARED = ("data.total_tokens", "data.batch_size", "checkpoint.every")
"""What the runs of a group must agree on: they draw the same batches and are saved together."""


class TrainerGroup:
    """Trains several SAEs, of any variants, widths and places, on the batches that are drawn once.

    Each has its own configuration, log, checkpoints and folder `out/NAME` (the name "" is `out`
    itself), and ends with the bits that it would have if it were trained alone on those batches.

    Args:
        cfgs: a run for each name; data.total_tokens, data.batch_size and checkpoint.every must
            agree.
        device: `auto`, or where to compute.
        out: folder of the runs' folders; None: nothing is written.
        starts: trained SAEs that some of the runs start from, by name.
        mesh: the processes that train all of them together, as in `Trainer`.

    Raises:
        ValueError: no run, a name that is no folder's, or runs that do not agree.
    """

    def __init__(
        self,
        cfgs: Mapping[str, TrainConfig],
        *,
        device: torch.device | str = "auto",
        out: Path | None = None,
        starts: Mapping[str, SAE] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        if not cfgs:
            raise ValueError("cfgs must hold at least one run, got none")
        for name in cfgs:
            if name != Path(name).name or name in (".", ".."):
                raise ValueError(f"cfgs must have names that are folders' names, got {name!r}")
        self.trainers = {
            name: Trainer(
                cfg,
                device=device,
                out=None if out is None else out / name,
                start=(starts or {}).get(name),
                mesh=mesh,
            )
            for name, cfg in cfgs.items()
        }
        first, *others = self.trainers.items()
        for field in SHARED:
            for name, trainer in others:
                wanted, got = map(attrgetter(field), (first[1].cfg, trainer.cfg))
                if got != wanted:
                    raise ValueError(
                        f"{field} must be one for all runs of a group, "
                        f"got {wanted} for {first[0]!r} and {got} for {name!r}"
                    )

    @property
    def steps_done(self) -> int:
        return self._one.steps_done

    @property
    def total_steps(self) -> int:
        return self._one.cfg.total_steps

    @property
    def batch_size(self) -> int:
        return self._one.cfg.data.batch_size or 1

    @property
    def _one(self) -> Trainer:
        return next(iter(self.trainers.values()))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The last line of each log."""
        return {name: trainer.metrics for name, trainer in self.trainers.items()}

    def fit(
        self,
        batches: Iterable[Batch | Mapping[str, Batch]],
        *,
        sample: Sample | Mapping[str, Sample] | None = None,
        progress: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> dict[str, SAE]:
        """Train until the tokens are used up; returns each SAE as it is exported.

        Args:
            batches: rows for all, or a mapping from each name to its rows (of another layer, say);
                from the group's current step on.
            sample: what each is initialised from, in the same form; None: the first batch.
            progress: called with a name and each line of that log.

        Raises:
            ValueError, FileExistsError, OutOfMemory, Interrupted: as in `Trainer.fit`.
        """
        cfgs = {name: trainer.cfg for name, trainer in self.trainers.items()}
        one = self._one
        with explained(MemoryPlan(cfgs, one.device, mesh=one.mesh.shape)):
            fit_together(self.trainers, batches, sample, progress)
        return {name: trainer.finish() for name, trainer in self.trainers.items()}

    def resume(self) -> bool:
        """Continue from the newest checkpoint that all have; False, from the start, without one.

        Newer ones, which some had written when a kill came, are removed: they are made again, of
        the same bits.
        """
        step = self._one.mesh.on_first(self._back_to_one_step)
        for trainer in self.trainers.values():
            trainer.resume()
        return step > 0

    def _back_to_one_step(self) -> int:
        folders = {n: t.out / "checkpoints" for n, t in self.trainers.items() if t.out is not None}
        found = {name: checkpoint_steps(folder) for name, folder in folders.items()}
        common = set.intersection(*map(set, found.values())) if found else set()
        step = max(common, default=0)
        for name, steps in found.items():
            for newer in (s for s in steps if s > step):
                remove_checkpoint(folders[name], newer)
        return step
