"""The main job: a language model's activations -> SAEs, evaluated and saved."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from fastsae.data import Activations, LanguageModel
from fastsae.device import resolve_device
from fastsae.distributed.mesh import TIMEOUT_SECONDS, Mesh, join_processes, restarted
from fastsae.distributed.watch import watched
from fastsae.evaluation.diagnosis import diagnose
from fastsae.files import write_json
from fastsae.interop.formats import load_sae
from fastsae.saes import SAE, SAES, SAEConfig
from fastsae.saes.transcoder import Transcodes
from fastsae.training import defaults
from fastsae.training.centre import Centre
from fastsae.training.config import Exchanged, OptimizerConfig, Tracking, TrainConfig
from fastsae.training.group import TrainerGroup
from fastsae.training.interruption import Interrupted, stop_requested
from fastsae.training.memory import MemoryPlan, explained
from fastsae.training.model_ranks import ModelRank, ServedSource
from fastsae.training.row_sources import FROM_SHARDS, ModelSource, ShardSource, row_source
from fastsae.training.run_folder import as_json, open_folder
from fastsae.training.side_by_side import SET_BY_THE_RUN, runs_of
from fastsae.training.trackers import check_installed

Distribution = Literal["split", "layers"]

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with the stage, what is done, what there is to do, and figures worth showing."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun:
    """Train one SAE on the activations of a language model, evaluate and save it."""

    out: Path
    """Folder for the SAE (`sae/`), the log, checkpoints, evaluation and pictures."""
    model: str | None = None
    """Hub name, local folder or .gguf file; None: SmolLM2-135M-Instruct, offline."""
    layer: int | None = None
    """Train on the residual stream after this layer; None: the middle one."""
    hook: str | None = None
    """Another place than the residual stream: `blocks.8.hook_mlp_out`, or a module's path."""
    dataset: str | None = None
    """Hub name or local text, jsonl, parquet or csv; None: Wikipedia articles, offline. What is
    large or on a hub is streamed, in its own order, as far as the tokens need."""
    text_column: str | None = None
    split: str = "train"
    """Split of a hub dataset. A tenth of any text, whole documents drawn at random, is held out."""
    context_size: int = 128
    """Tokens a context."""
    tokens: int = 1_000_000
    """Tokens of training; more than the text holds means several passes over it."""
    harvest_tokens: int | None = None
    """Tokens whose activations are held in memory and gone over; None: as many as are trained on,
    or all of the text."""
    stream: bool = False
    """Run the model beside the training, over as much text as that takes, instead of before it: no
    more than `buffer_rows` are in memory. A run that is resumed makes the earlier rows again."""
    buffer_rows: int = 65_536
    """Rows that are mixed in memory where the model runs beside the training."""
    mixing: float = 0.5
    """Fraction of them that stays when the others are replaced."""
    activations: Path | None = None
    """Folder that `fastsae harvest` wrote, to train on its rows without a language model; the text
    is then the harvest's, and `hook` or `layer` one of its places."""
    variant: str = "topk"
    """Kind of SAE; `--variant NAME --help` lists its own options."""
    sae: dict[str, Any] = field(default_factory=dict)
    """The variant's configuration, field by field, where it is not the default. Without d_sae there
    are 16 times as many latents as the activations have dimensions."""
    batch_size: int | None = None
    """Tokens a step; None: by device and length of the run."""
    micro_batch_size: int | None = None
    """Tokens whose gradient is computed at once, to spare memory; None: the batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    b_dec_init: Centre = "mean"
    """Where b_dec starts, of a sample of the rows."""
    finetune_from: str | None = None
    """Folder of a trained SAE, in any format that `fastsae convert` reads, to start from."""
    massive_multiple: float = 10.0
    """Rows with a norm above this multiple of the median are left out, as are first positions."""
    eval_tokens: int = 16_384
    """Held-out tokens to evaluate on."""
    checkpoints: int = 4
    """Checkpoints over the run; the newest two are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps are kept as well."""
    resample_every: int | None = None
    """Steps between two resamplings of dead latents; None: never, AuxK revives them."""
    log_to: tuple[Tracking, ...] = ()
    """Where the log goes besides metrics.jsonl: wandb, tensorboard, trackio."""
    project: str = "fastsae"
    """The run's project there."""
    also: tuple[dict[str, Any], ...] = ()
    """Further SAEs, trained side by side on the same batches: for each what differs, such as
    "k=16 layer=8", among variant, layer, hook, seed and the fields of the SAE and the optimizer.
    Each has its folder."""
    dp: int = 1
    """Processes among which each batch is split, of those that torchrun starts."""
    tp: int = 1
    """Processes among which the dictionary is split, by latent; dp * tp processes in all."""
    exchange: Exchanged = "auto"
    """What processes that have parts of a batch send each other: `pairs`, dense `rows` of the
    gradient, or the fewer bytes."""
    distribute: Distribution = "split"
    """What several processes share: each SAE (`split`, by dp and tp), or the list of SAEs
    (`layers`): then every process trains some of those in `also` whole, and dp and tp stay 1."""
    model_ranks: int = 0
    """Further processes, the last of those that torchrun starts, that run the model of a `stream`
    for the others, which then do not load it: dp * tp + model_ranks processes in all."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """After which a process that does not answer ends the run."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue from the newest checkpoint in `out`, to the same bits; so does a run that torchrun's
    `--max-restarts` started again."""

    def __post_init__(self) -> None:
        if self.layer is not None and self.hook is not None:
            raise ValueError(f"layer must be None when hook is given, got {self.layer}")
        for name in ("tokens", "eval_tokens", "checkpoints", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.variant not in SAES:
            raise ValueError(f"variant must be one of {sorted(SAES)}, got {self.variant!r}")
        if issubclass(SAES[self.variant], Transcodes):
            raise ValueError(
                f"variant must reconstruct its input, got {self.variant!r}: a transcoder trains "
                "with Trainer, on pairs of rows and targets"
            )
        if self.distribute not in get_args(Distribution):
            raise ValueError(
                f"distribute must be one of {list(get_args(Distribution))}, got {self.distribute!r}"
            )
        if self.distribute == "layers" and (self.dp, self.tp) != (1, 1):
            raise ValueError(
                f"dp and tp must be 1 with distribute 'layers', got {self.dp} and {self.tp}"
            )
        if self.activations is not None:
            for f in fields(LanguageModelRun):
                if f.name in FROM_SHARDS and getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name} must be left to the harvest where activations are given, got "
                        f"{getattr(self, f.name)!r}"
                    )
        if self.model_ranks and not self.stream:
            raise ValueError(f"model_ranks must be 0 without stream, got {self.model_ranks}")
        if not 0 <= self.model_ranks <= self.dp * self.tp or (
            self.model_ranks and self.distribute == "layers"
        ):
            raise ValueError(
                "model_ranks must be at most dp * tp, and 0 with distribute 'layers', got "
                f"{self.model_ranks}"
            )
        if self.stream and self.harvest_tokens is not None:
            raise ValueError(
                f"harvest_tokens must be None with stream, got {self.harvest_tokens}: buffer_rows "
                "says how many rows are in memory"
            )
        known = [f.name for f in fields(SAES[self.variant].config_class)]
        for name in self.sae:
            if name not in known or name in SET_BY_THE_RUN:
                settable = [name for name in known if name not in SET_BY_THE_RUN]
                raise ValueError(
                    f"sae must hold fields of the variant {self.variant} among {settable}, "
                    f"got {name!r}"
                )
        runs_of(self)


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

    Activations are harvested once a hook, and every SAE of it gets the same batches. Of several
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
        source.read(places, tell)
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
        name: _Ended(trainer.cfg.sae, trainer.metrics, trainer.density())
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
    runs = runs_of(run)
    hooks = {name: model.source.place(one) for name, one in runs.items()}
    timings = {"train": time.perf_counter() - started}
    saes = _written(run, runs, device)
    return _evaluated(run, model.source, hooks, saes, ended, timings, tell)


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
    wanted = run.dp * run.tp + run.model_ranks
    if wanted != world.size:
        raise ValueError(
            f"dp * tp + model_ranks must be the number of processes, got {run.dp} * {run.tp} + "
            f"{run.model_ranks} and {world.size} processes; start with: torchrun --nproc-per-node "
            f"{wanted} -m fastsae train ..."
        )
    return Mesh(run.dp, run.tp, device, run.model_ranks)


def _source(
    run: LanguageModelRun, world: Mesh, mesh: Mesh, device: torch.device
) -> ModelSource | ShardSource | ServedSource:
    if mesh.beside:
        return ServedSource(world, mesh)
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
        total_tokens=run.tokens,
        batch_size=run.batch_size,
        micro_batch_size=run.micro_batch_size,
        optimizer=one.optimizer,
        b_dec_init=one.b_dec_init,
        keep_every=run.keep_every,
        resample_every=one.resample_every,
        exchange=run.exchange,
        log_to=run.log_to,
        project=run.project,
        seed=one.seed,
    ).resolved(resolve_device(run.device))
    return replace(cfg, checkpoint_every=max(1, cfg.total_steps // run.checkpoints))
