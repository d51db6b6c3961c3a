"""One SAE, one stream of rows: where it starts, log, checkpoints, what comes out."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from fastsae.distributed.assembly import shard_of, whole_shape
from fastsae.distributed.export import write_shards
from fastsae.distributed.mesh import Mesh
from fastsae.files import replacing
from fastsae.saes import SAE, SAELoss
from fastsae.training.centre import CENTRES
from fastsae.training.checkpoint import latest_checkpoint, load_checkpoint
from fastsae.training.config import TrainConfig
from fastsae.training.directions import start_at_whitened_rows
from fastsae.training.figures import check_finite, figures_of
from fastsae.training.log import RunLog
from fastsae.training.loop import fit_together, save_together
from fastsae.training.memory import MemoryPlan, explained
from fastsae.training.trackers import Tracker, trackers_of
from fastsae.training.update import Update

if TYPE_CHECKING:
    from fastsae.training.sharded_checkpoint import SavesBehind

Batch = Float[Tensor, "B D"] | tuple[Float[Tensor, "B D"], Float[Tensor, "B D_out"]]
"""Rows, or rows and the targets of a transcoder."""
Sample = Float[Tensor, "N D"] | tuple[Float[Tensor, "N D"], Float[Tensor, "N D_out"]]
"""The same of another number, to initialise from."""
NEVER_FIRED_FREQUENCY = 1e-10  # what SAELens adds before the logarithm


class Trainer(Update):
    """Trains one SAE on rows that somebody else draws.

    `fit` runs a whole stream, `step` one batch. `metrics` holds the last line of the log.

    Args:
        cfg: the run; fields left at None are resolved for `device`.
        device: `auto`, or where to compute.
        out: folder for `metrics.jsonl` and `checkpoints/`; None: nothing is written.
        start: a trained SAE of unscaled rows, whose parameters the run starts from; None: random.
        mesh: the processes that train this SAE together, each of which makes the same calls with
            its own rows: `batch_size / mesh.size` of each batch, in the order of their ranks. None:
            this one alone.

    Raises:
        ValueError: the processes' configurations or versions differ, or the run cannot be split.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        *,
        device: torch.device | str = "auto",
        out: Path | None = None,
        start: SAE | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(cfg, device, mesh)
        if start is not None:
            check_fits(self.sae, start)
        self.start = start
        self.out = out
        self.saves = _saves_behind(self.mesh)
        self.log = RunLog(None if out is None else out / "metrics.jsonl")
        self.metrics: dict[str, Any] = {}
        self.training_seconds = 0.0
        self._trackers: list[Tracker] = []

    @torch.no_grad()
    def initialise(
        self, rows: Float[Tensor, "N D"], targets: Float[Tensor, "N D_out"] | None = None
    ) -> None:
        """Set what depends on the data: the scaling of the rows, and where the SAE starts.

        An SAE that was handed in to start from keeps its own b_dec.
        """
        parts = [rows] if targets is None else [rows, targets]
        for part in parts:
            check_finite(part, self.steps_done + 1, self.mesh)
        wide = [self._here(part, torch.float32) for part in parts]
        self.scaling.fit(*wide)
        if self.mesh.size > 1:
            self.scaling.load_state_dict(self._of_first(self.scaling.state_dict()))
        if self.start is not None:
            state = self.start.state_dict()
            self.sae.load_state_dict(shard_of(self.sae, state), strict=False)
            self.scaling.unfold(self.sae)
            self.copy_weights()
            self.start = None
            return
        scaled = [self.scaling.apply(wide[0]), *map(self.scaling.apply_to_targets, wide[1:])]
        self.sae.initialise(*scaled, centre=CENTRES[self.cfg.b_dec_init])
        self.mesh.broadcast(self.sae.b_dec.data)
        if self.cfg.W_dec_init == "whitened_rows":
            start_at_whitened_rows(self.sae, scaled[0], self.mesh, self.cfg.seed)
            self.copy_weights()

    def _of_first(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What rank 0 found of its sample."""
        for name, t in state.items():
            state[name] = t = t.to(self.device)
            self.mesh.broadcast(t)
        return state

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        sample: Sample | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> SAE:
        """Train until the run's tokens are used up; returns the SAE as it is exported.

        Args:
            batches: rows [batch_size, D], from the run's current step on; for a transcoder, pairs
                of rows and targets [batch_size, D_out].
            sample: rows to initialise from; None: the first batch. Unused when resuming.
            progress: called with each line of the log.

        Raises:
            ValueError: the batches end too early, or hold NaN or inf (the step is named).
            FileExistsError: `out` holds checkpoints of another run, which was not resumed.
            OutOfMemory: with the breakdown and the settings that free most.
            Interrupted: SIGINT or SIGTERM came and `out` is a folder; the step was finished and a
                checkpoint saved.
        """
        tell = None if progress is None else (lambda _, line: progress(line))
        with explained(MemoryPlan({"": self.cfg}, self.device, mesh=self.mesh.shape)):
            fit_together({"": self}, batches, sample, tell)
        return self.finish()

    def finish(self) -> SAE:
        """Give the weights back to ordinary autograd; the SAE as it is exported."""
        self.optimizer.release()
        self.sae.compute_copies = {}
        return self.export()

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside this context lines of the log go to the trackers of the configuration too."""
        if not self.mesh.is_first:
            yield
            return
        with trackers_of(self.cfg, self.out, self.steps_done) as self._trackers:
            try:
                yield
            finally:
                self._trackers = []

    def advance(self, batch: Batch, sample: Sample | None = None) -> None:
        """A step of a run: initialise before the first, check and log where that is due."""
        if self.steps_done == 0:
            self.initialise(*_rows_and_targets(batch if sample is None else sample))
        started = time.perf_counter()
        number = self.steps_done + 1
        logged, saved = self.is_logged(number), self.is_saved(number)
        if logged or saved:
            for part in _rows_and_targets(batch):
                check_finite(part, number, self.mesh)
        loss = self.step(*_rows_and_targets(batch))
        self.training_seconds += time.perf_counter() - started
        if logged or saved:
            self.check_loss()
        if logged:
            self._record(loss)

    @torch.no_grad()
    def export(self) -> SAE:
        """A copy that takes rows as they are, in the form it is used in: scaling and decoder norms
        folded in. Where the dictionary is split, of this process's latents: what it computes with
        the others is the whole dictionary's; `write_sae` puts the shards together on disk."""
        sae = copy.deepcopy(self.sae)
        sae.compute_copies = {}
        return self.scaling.as_used(sae)

    def write_sae(self, folder: Path) -> None:
        """Write the SAE as it is exported, in SAELens's format, with how often each latent fired.

        Of several processes each writes its own latents.
        """
        sae = self.export()
        if self.mesh.size == 1:
            sae.save_model(folder)
        else:
            write_shards(sae, self.mesh, folder)
        sparsity = self.log_sparsity().float().cpu()
        self.mesh.on_first(lambda: write_sparsity(folder, sparsity))

    def log_sparsity(self) -> Float[Tensor, " F"]:
        """log10 of each latent's firing frequency over the run."""
        return torch.log10(self.density() + NEVER_FIRED_FREQUENCY)

    def density(self) -> Float[Tensor, " F"]:
        """Each latent's firing frequency over the run; of all shards."""
        fired = torch.cat(self.mesh.gather_ragged(self.dead.fired, "tp"))
        return fired / max(1, self.dead.tokens)

    def save(self) -> Path:
        """Write a checkpoint; older ones than are kept are removed.

        Several processes write behind the training: it is there after `settle`.
        """
        return save_together([self])[0]

    def resume(self) -> bool:
        """Continue from the newest checkpoint under `out`; False, from the start, without one."""
        out = self.out
        path = None
        if out is not None:
            path = self.mesh.on_first(lambda: latest_checkpoint(out / "checkpoints"))
        if path is not None:
            load_checkpoint(self, path)
        self.mesh.on_first(lambda: self.log.truncate(self.steps_done))
        self.metrics = self.log.last()
        return path is not None

    def settle(self) -> None:
        """Wait until the checkpoints that were saved are on disk."""
        if self.saves is not None:
            self.saves.wait()

    def is_logged(self, step: int) -> bool:
        return step % self.cfg.log.every == 0 or step in (1, self.cfg.total_steps)

    def is_saved(self, step: int) -> bool:
        every = self.cfg.checkpoint.every
        return self.out is not None and every is not None and step % every == 0

    def _record(self, loss: SAELoss) -> None:
        self.metrics = {
            "step": self.steps_done,
            "tokens": self.dead.tokens,
            "loss": float(self._total),
            **figures_of(loss, self.dead, self.mesh),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.training_seconds, 3),
            "tokens_per_second": round(self.dead.tokens / self.training_seconds),
        }
        if self.mesh.is_first:
            self.log.write(self.metrics)
            for tracker in self._trackers:
                tracker.write(self.metrics)


def _saves_behind(mesh: Mesh) -> "SavesBehind | None":
    """Where several processes save; None for one, which is spared a second of imports."""
    if mesh.size == 1:
        return None
    from fastsae.training.sharded_checkpoint import SavesBehind

    return SavesBehind(mesh)


def write_sparsity(folder: Path, log_sparsity: Float[Tensor, " F"]) -> None:
    with replacing(folder / "sparsity.safetensors") as temporary:
        save_file({"sparsity": log_sparsity}, temporary)


def check_fits(sae: SAE, start: SAE) -> None:
    """Raise ValueError where `start` lacks a parameter of `sae`, or has it in another shape."""
    given = start.state_dict()
    for name, parameter in sae.named_parameters():
        got = list(given[name].shape) if name in given else "none"
        wanted = whole_shape(sae, name, parameter)
        if got != wanted:
            raise ValueError(
                f"start must have the parameter {name} {wanted} of the "
                f"architecture {sae.cfg.architecture!r}, got {got} in a {start.cfg.architecture!r}"
            )


def _rows_and_targets(batch: Batch) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else batch
