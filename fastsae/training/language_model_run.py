"""The main job: a language model's activations -> SAEs, evaluated and saved."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch

from fastsae.data import Activations, LanguageModel
from fastsae.device import resolve_device
from fastsae.distributed.mesh import Mesh, join_processes, restarted
from fastsae.distributed.watch import watched
from fastsae.evaluation.diagnosis import diagnose
from fastsae.files import write_json
from fastsae.interop.formats import load_sae
from fastsae.saes import SAE, SAES, SAEConfig
from fastsae.training import defaults
from fastsae.training.config import CheckpointConfig, DataConfig, LogConfig, TrainConfig
from fastsae.training.group import TrainerGroup
from fastsae.training.interruption import Interrupted, stop_requested
from fastsae.training.memory import MemoryPlan, explained
from fastsae.training.model_ranks import ModelRank, ServedSource
from fastsae.training.row_sources import ModelSource, ShardSource, row_source
from fastsae.training.run_config import LanguageModelRun, Progress
from fastsae.training.run_folder import as_json, open_folder
from fastsae.training.side_by_side import runs_of
from fastsae.training.trackers import check_installed


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory, for a demonstration or a notebook."""

    sae: SAE
    report: dict[str, Any]
    lm: LanguageModel | None
    """None after training from shards."""
    held_out: Activations | None
    """Likewise."""
    density: torch.Tensor
    """[F] firing frequency over the training run."""
    timings: dict[str, float]
    """Seconds of each stage."""


def train_on_language_model(run: LanguageModelRun, progress: Progress | None = None) -> Trained:
    """Harvest, train, save and evaluate one SAE; everything is written under `run.out`.

    Raises:
        FileExistsError: `out` holds a run and `resume` is False.
        OSError: `out` cannot be written to.
        ValueError: an argument breaks the rule it names, or the activations hold NaN or inf.
        OutOfMemory: with the breakdown and the settings that free most.
        ImportError: the `train` extra is absent.
    """
    if run.also:
        raise ValueError("also must be empty for one SAE; train_side_by_side takes several")
    return train_side_by_side(run, progress)[""]


def train_side_by_side(
    run: LanguageModelRun,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Trained]:
    """The same for the SAE of the run and those in `also`, by the names of their folders.

    Activations are harvested in one pass, and all SAEs of a hook get the same batches. Of several
    processes all make this call: of SAEs that are split the first evaluates and returns the whole
    ones, and the others return none; of `layers` each has its own.

    Args:
        say: called with what is known before the work starts: the memory it will take.
    """
    timings: dict[str, float] = {}
    check_installed(run.log_to)
    device = resolve_device(run.device)
    world = Mesh(dp=join_processes(device, run.timeout_seconds), device=device)
    if world.any(restarted()):  # a machine counts the failures of its own processes only
        run = replace(run, resume=True)
    mesh = _mesh(run, world, device)
    tell: Progress = progress if progress is not None and world.is_first else lambda *_: None
    world.check_agreement(as_json(run))
    world.on_first(lambda: open_folder(run))
    patient = world.patient() if world.size > 1 else world
    if mesh.beside:  # whoever waits for a model waits for as long as it takes
        world = patient
    if not mesh.has_this_process:
        return _beside(run, world, mesh, device, progress or (lambda *_: None))
    source = _source(run, world, mesh, device)
    runs = _runs_here(run, world)
    hooks = {name: source.place(one) for name, one in runs.items()}
    places = set(hooks.values())
    starts = {
        name: load_sae(one.finetune_from, device)
        for name, one in runs.items()
        if one.finetune_from is not None
    }
    cfgs = {
        name: _config(run, one, source, hooks[name], starts.get(name)) for name, one in runs.items()
    }
    plan = MemoryPlan(cfgs, device, source.held_bytes(places), source.halved, mesh.shape)
    if say is not None and world.is_first:
        say(plan.table() if plan.fits else f"{plan.table()}\n{plan.advice()}")
    with explained(plan):
        started = time.perf_counter()
        if mesh.beside:
            source.read(places, tell)
        else:
            # Nobody trains before all have what they train on, however long one's checksums take.
            patient.each(lambda: source.read(places, tell))
        timings["harvest"] = time.perf_counter() - started

        started = time.perf_counter()
        group = TrainerGroup(cfgs, device=device, out=run.out, starts=starts, mesh=mesh)
        if world.is_first:
            write_json(run.out / "run.json", as_json(run))
        if run.resume:
            group.resume()
        total, first = run.tokens, next(iter(runs))
        size, steps = group.batch_size, range(group.steps_done, group.total_steps)
        # Closed before the evaluation: what reads ahead may be running the model.
        with _told(world, mesh), closing(source.batches(places, size, steps)) as batches:
            saes = group.fit(
                ({name: drawn[hook] for name, hook in hooks.items()} for drawn in batches),
                sample={name: source.sample(hook) for name, hook in hooks.items()},
                progress=lambda n, line: (
                    tell("train", line["tokens"], total, line) if n == first else None
                ),
            )
        for name, trainer in group.trainers.items():
            trainer.write_sae(run.out / name / "sae")
        timings["train"] = time.perf_counter() - started

    ended = {
        name: _Ended(trainer.cfg.sae, trainer.metrics, trainer.density().cpu())
        for name, trainer in group.trainers.items()
    }
    if isinstance(source, ServedSource):
        world.on_first(lambda: ended)
        return {}
    if not mesh.is_first:
        return {}
    if mesh.size > 1:  # shards: read what all have written together
        saes = _written(run, runs, device)
    return _evaluated(run, source, hooks, saes, ended, timings, tell)


class _Ended(NamedTuple):
    """What is left of a training besides the SAE."""

    cfg: SAEConfig
    metrics: dict[str, Any]
    density: torch.Tensor


def _beside(
    run: LanguageModelRun, world: Mesh, mesh: Mesh, device: torch.device, tell: Progress
) -> dict[str, Trained]:
    """What a process does that runs the model for those that train; the first of them evaluates."""
    started = time.perf_counter()
    model = ModelRank(run, device, world, mesh)
    # Whoever wants the run to stop tells those that train, and they tell this process.
    with stop_requested(), watched(mesh, lambda: model.steps_done):
        model.serve()
        ended: dict[str, _Ended] = world.on_first(dict)
    if world.rank != mesh.size:
        return {}
    timings = {"train": time.perf_counter() - started}
    saes = _written(run, model.hooks, device)
    return _evaluated(run, model.source, model.hooks, saes, ended, timings, tell)


@contextmanager
def _told(world: Mesh, mesh: Mesh) -> Iterator[None]:
    """Those beside the mesh hear of it when those in it are interrupted."""
    try:
        yield
    except Interrupted as interrupted:
        if mesh.beside:
            world.on_first(partial(_raise, interrupted))
        raise


def _raise(error: Exception) -> None:
    raise error


def _written(run: LanguageModelRun, runs: Iterable[str], device: torch.device) -> dict[str, SAE]:
    return {name: SAE.load_from_disk(run.out / name / "sae", device=device) for name in runs}


def _evaluated(
    run: LanguageModelRun,
    source: ModelSource | ShardSource,
    hooks: Mapping[str, str],
    saes: Mapping[str, SAE],
    ended: Mapping[str, _Ended],
    timings: dict[str, float],
    tell: Progress,
) -> dict[str, Trained]:
    """Evaluate the SAEs and save what was found."""
    started = time.perf_counter()
    reports: dict[str, dict[str, Any]] = {}
    for hook in set(hooks.values()):
        here = {name: sae for name, sae in saes.items() if hooks[name] == hook}
        reports |= source.evaluate(hook, here, lambda a, b: tell("evaluate", a, b, {}))
    timings["evaluate"] = time.perf_counter() - started
    for name, report in reports.items():
        report["training"] = ended[name].metrics
        report["verdicts"] = [asdict(v) for v in diagnose(ended[name].cfg, report)]
        write_json(run.out / name / "eval.json", report)
    return {
        name: Trained(
            sae,
            reports[name],
            source.lm,
            source.held_out(hooks[name]),
            ended[name].density,
            timings,
        )
        for name, sae in saes.items()
    }


def _mesh(run: LanguageModelRun, world: Mesh, device: torch.device) -> Mesh:
    """The processes that train an SAE together."""
    if run.distribute == "layers":
        return Mesh(device=device)
    dp, tp = run.mesh_shape(world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    return Mesh(dp, tp, device, run.model_ranks, timedelta(seconds=run.timeout_seconds))


def _source(
    run: LanguageModelRun, world: Mesh, mesh: Mesh, device: torch.device
) -> ModelSource | ShardSource | ServedSource:
    if mesh.beside:
        return ServedSource(world, mesh)
    if run.distribute == "layers" and not world.is_first:
        run = replace(run, verify=False)  # the first looks at all shards
    return row_source(run, device, mesh.rank, mesh.size)


def _runs_here(run: LanguageModelRun, world: Mesh) -> dict[str, LanguageModelRun]:
    """Those of the SAEs that this process trains, alone or with all others."""
    runs = runs_of(run)
    if run.distribute == "split":
        return runs
    if len(runs) < world.size:
        raise ValueError(
            f"also must give every process an SAE with distribute 'layers', got {len(runs)} for "
            f"{world.size} processes"
        )
    return dict([*runs.items()][world.rank :: world.size])


def _config(
    run: LanguageModelRun,
    one: LanguageModelRun,
    source: ModelSource | ShardSource | ServedSource,
    hook: str,
    start: SAE | None,
) -> TrainConfig:
    """Of one of the run's SAEs: the text and the order of the rows are the run's."""
    d_in = source.width(hook)
    d_sae = one.sae.get("d_sae") or (start and start.cfg.d_sae)
    shape = {
        **defaults.sae_fields(one.variant),
        **one.sae,
        "d_in": d_in,
        "d_sae": defaults.d_sae(d_in) if d_sae is None else d_sae,
        "metadata": source.metadata(hook),
    }
    cfg = TrainConfig(
        sae=SAES[one.variant].config_class(**shape),
        data=DataConfig(
            total_tokens=run.tokens,
            batch_size=run.batch_size,
            micro_batch_size=run.micro_batch_size,
        ),
        optimizer=one.optimizer,
        schedule=one.schedule,
        b_dec_init=one.b_dec_init,
        W_dec_init=one.W_dec_init,
        checkpoint=CheckpointConfig(keep=run.keep, keep_every=run.keep_every),
        resample_every=one.resample_every,
        exchange=run.exchange,
        log=LogConfig(to=run.log_to, project=run.project),
        seed=one.seed,
    ).resolved(resolve_device(run.device))
    every = max(1, cfg.total_steps // run.checkpoints)
    return replace(cfg, checkpoint=replace(cfg.checkpoint, every=every))
