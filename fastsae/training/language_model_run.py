"""The main job: text -> a language model's activations -> an SAE, evaluated and saved."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastsae.data import (
    Activations,
    HookPoint,
    LanguageModel,
    d_at,
    harvest,
    load_language_model,
    load_text,
    resid_hook_name,
    resolve_hook,
    split_documents,
    tokenize,
)
from fastsae.data.batches import ShuffledRows
from fastsae.device import resolve_device
from fastsae.evaluation.evaluate import evaluate
from fastsae.files import replacing, write_json
from fastsae.interop.formats import load_sae
from fastsae.saes import SAE, SAES
from fastsae.saes.transcoder import Transcodes
from fastsae.training import defaults
from fastsae.training.centre import Centre
from fastsae.training.config import OptimizerConfig, TrainConfig
from fastsae.training.trainer import Trainer

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with the stage, what is done, what there is to do, and figures worth showing."""


SET_BY_THE_RUN = ("d_in", "reshape_activations", "metadata")
"""Fields of an SAE's configuration that follow from the model, the hook and the text."""


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
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue from the newest checkpoint in `out`, to the same bits."""

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
        known = [f.name for f in fields(SAES[self.variant].config_class)]
        for name in self.sae:
            if name not in known or name in SET_BY_THE_RUN:
                settable = [name for name in known if name not in SET_BY_THE_RUN]
                raise ValueError(
                    f"sae must hold fields of the variant {self.variant} among {settable}, "
                    f"got {name!r}"
                )


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory, for a demonstration or a notebook."""

    sae: SAE
    report: dict[str, Any]
    lm: LanguageModel
    held_out: Activations
    density: torch.Tensor
    """[F] firing frequency over the training run."""
    timings: dict[str, float]
    """Seconds of each stage."""


def train_on_language_model(run: LanguageModelRun, progress: Progress | None = None) -> Trained:
    """Harvest, train, save and evaluate; everything is written under `run.out`.

    Raises:
        FileExistsError: `out` holds a run and `resume` is False.
        OSError: `out` cannot be written to.
        ValueError: an argument breaks the rule it names, or the activations hold NaN or inf.
        ImportError: the `train` extra is absent.
    """
    tell = progress or (lambda *_: None)
    timings: dict[str, float] = {}
    _open_folder(run)
    device = resolve_device(run.device)
    lm = load_language_model(run.model, device=device)
    layer = lm.n_layers // 2 if run.layer is None else run.layer
    hook = resolve_hook(lm, run.hook or resid_hook_name(layer))
    start = None if run.finetune_from is None else load_sae(run.finetune_from, device)
    cfg = _config(run, lm, hook, start)

    started = time.perf_counter()
    train, held_out = _harvest(run, lm, hook, tell)
    timings["harvest"] = time.perf_counter() - started

    started = time.perf_counter()
    trainer = Trainer(cfg, device=device, out=run.out, start=start)
    write_json(run.out / "run.json", _as_json(run))
    if run.resume:
        trainer.resume()
    batches = ShuffledRows(train.rows, trainer.cfg.batch_size or 1, run.seed)
    total = trainer.cfg.total_tokens
    sae = trainer.fit(
        batches.from_step(trainer.steps_done),
        sample=train.rows[:: max(1, len(train.rows) // 65_536)],
        progress=lambda line: tell("train", line["tokens"], total, line),
    )
    timings["train"] = time.perf_counter() - started

    sae.save_model(run.out / "sae")
    with replacing(run.out / "sae" / "sparsity.safetensors") as temporary:
        save_file({"sparsity": trainer.log_sparsity().float().cpu()}, temporary)
    started = time.perf_counter()
    report = evaluate(sae, lm, hook, held_out, progress=lambda a, b: tell("evaluate", a, b, {}))
    report["training"] = trainer.metrics
    write_json(run.out / "eval.json", report)
    timings["evaluate"] = time.perf_counter() - started
    density = trainer.dead.fired / max(1, trainer.dead.tokens)
    return Trained(sae, report, lm, held_out, density, timings)


FREE_ON_RESUME = {"out", "resume", "device", "eval_tokens", "checkpoints"}


def _open_folder(run: LanguageModelRun) -> None:
    """Refuse another run's folder before the long work, and one that cannot be written to."""
    path = run.out / "run.json"
    if not path.exists():
        write_json(run.out / ".writable", True)
        (run.out / ".writable").unlink()
        return
    if not run.resume:
        raise FileExistsError(
            f"out must be a folder without a run, got {run.out}; continue it with --resume or "
            "choose another"
        )
    then, now = json.loads(path.read_text()), _as_json(run)
    changed = [k for k in now if k not in FREE_ON_RESUME and then.get(k) != now[k]]
    if changed:
        listing = "; ".join(f"{k}: {then.get(k)!r} then, {now[k]!r} now" for k in changed)
        raise ValueError(f"run must be the one in {run.out} to resume it, got {listing}")


def _as_json(run: LanguageModelRun) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(run), default=str))


def _harvest(
    run: LanguageModelRun, lm: LanguageModel, hook: HookPoint, tell: Progress
) -> tuple[Activations, Activations]:
    text = load_text(run.dataset, split=run.split, text_column=run.text_column)
    budgets = (run.harvest_tokens or run.tokens, run.eval_tokens)
    tokens = [
        tokenize(part, lm.tokenizer, context_size=run.context_size, n_tokens=budget)
        for part, budget in zip(split_documents(text, seed=run.seed), budgets, strict=True)
    ]
    train, held_out = (
        harvest(
            lm,
            hook,
            part,
            massive_multiple=run.massive_multiple,
            progress=lambda done, total, name=name: tell(name, done, total, {}),
        )
        for part, name in zip(tokens, ("harvest", "harvest held-out"), strict=True)
    )
    return train, held_out


def _config(
    run: LanguageModelRun, lm: LanguageModel, hook: HookPoint, start: SAE | None
) -> TrainConfig:
    d_in = d_at(lm, hook)
    d_sae = run.sae.get("d_sae") or (start and start.cfg.d_sae)
    shape = {
        **defaults.sae_fields(run.variant),
        **run.sae,
        "d_in": d_in,
        "d_sae": defaults.d_sae(d_in) if d_sae is None else d_sae,
        "metadata": {
            "model_name": lm.name,
            "hook_name": hook.name,
            "context_size": run.context_size,
            "dataset_path": run.dataset,
            "dataset_split": run.split,
            "text_column": run.text_column,
            "held_out_seed": run.seed,
            "massive_multiple": run.massive_multiple,
        },
    }
    cfg = TrainConfig(
        sae=SAES[run.variant].config_class(**shape),
        total_tokens=run.tokens,
        batch_size=run.batch_size,
        micro_batch_size=run.micro_batch_size,
        optimizer=run.optimizer,
        b_dec_init=run.b_dec_init,
        keep_every=run.keep_every,
        seed=run.seed,
    ).resolved(resolve_device(run.device))
    return replace(cfg, checkpoint_every=max(1, cfg.total_steps // run.checkpoints))
