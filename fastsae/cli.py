"""`fastsae train | harvest | eval | plot | convert | plan | bench | demo`."""

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from fastsae.analysis.plots import density_of_run, plot_run
from fastsae.analysis.top_tokens import interesting_latents, top_tokens
from fastsae.data import load_language_model, load_text, resolve_hook, tokenize
from fastsae.data.harvest_run import HarvestRun, harvest_to_disk
from fastsae.data.model_rows import RowRules
from fastsae.data.text import split_documents
from fastsae.device import resolve_device
from fastsae.distributed.mesh import is_one_of_several, leave_processes
from fastsae.distributed.plan import Plan, plan_report
from fastsae.evaluation.diagnosis import Verdict, verdict_table
from fastsae.evaluation.evaluate import comparison_table, evaluate_on_text, report_table
from fastsae.extras import require
from fastsae.files import write_json
from fastsae.interop.convert import Convert, convert
from fastsae.interop.formats import load_sae
from fastsae.progress import ProgressBar
from fastsae.saes import SAE, SAES
from fastsae.training import defaults
from fastsae.training.interruption import EXIT_CODE, Interrupted
from fastsae.training.language_model_run import Trained, train_side_by_side
from fastsae.training.log import read_log
from fastsae.training.run_config import LanguageModelRun
from fastsae.training.side_by_side import SET_BY_THE_RUN, changes_in

EXAMPLE_LATENTS = 6


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a saved SAE on held-out text of a language model."""

    sae: tuple[Path, ...]
    """Folder of an SAE, in any format that `convert` reads, or of a run's checkpoint; several of
    one hook share the passes."""
    model: str | None = None
    """Language model; None: the one in the SAE's metadata."""
    revision: str | None = None
    """Branch, tag or commit of a model on a hub; None: as in training, or main."""
    hook: str | None = None
    """Hook name; None: the one in the SAE's metadata."""
    dataset: str | None = None
    """Hub name or local file; None: what the SAE was trained on, of which it has not seen the
    held-out tenth."""
    text_column: str | None = None
    """Column with the documents; None: as in training, or the only one of strings."""
    split: str | None = None
    """Split of a hub dataset; None: as in training."""
    all_documents: bool = False
    """Evaluate on every document, not only on the tenth that `train` holds out."""
    tokens: int = 16_384
    """Held-out tokens."""
    drop_special: bool | None = None
    """Leave out the rows of the tokenizer's special tokens; None: as in training, or True."""
    massive_multiple: float | None = None
    """Rows above this multiple of the median norm are left out; None: as in training, or 10."""
    device: str = "auto"
    out: Path | None = None
    """JSON file to write; None: print only."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw a run's curves and the density of its latents."""

    run: Path
    """Folder of a run, finished or not."""
    out: Path | None = None
    """PNG to write; None: `curves.png` in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, evaluate, save and picture a small SAE offline, in a few minutes on two cores."""

    out: Path = Path("runs/demo")
    tokens: int = 400_000
    """Tokens of training, in several passes over the activations."""
    harvest_tokens: int = 160_000
    layer: int = 9
    d_sae: int = 4608
    k: int = 32
    seed: int = 0
    device: str = "auto"


def train(run: LanguageModelRun) -> None:
    """Train an SAE on a language model's activations, from the model itself or from the folder of
    a harvest; evaluate, save and picture it."""
    with ProgressBar() as bar:
        trained = train_side_by_side(run, bar, print)
    leave_processes()
    for name, one in trained.items():
        if name:
            print(f"\n{name}")
        _finish(run.out / name, one)
    if len(trained) > 1:
        print()
        print(comparison_table({name: one.report for name, one in trained.items()}))


def evaluate_saved(args: Eval) -> None:
    """Evaluate a saved SAE on held-out text of a language model."""
    device = resolve_device(args.device)
    saes = {str(path): load_sae(path, device) for path in args.sae}
    own_model = args.model is None and args.revision is None
    metadata = _shared_metadata(saes, MUST_AGREE + ("model_revision",) * own_model)
    hook_name = args.hook or metadata.get("hook_name")
    if hook_name is None:
        names = ", ".join(saes)
        raise ValueError(f"hook must be given for an SAE without hook_name in {names}, got None")
    model = args.model or metadata.get("model_name")
    of_training = metadata.get("model_revision") if model == metadata.get("model_name") else None
    lm = load_language_model(model, device=device, revision=args.revision or of_training or "main")
    hook = resolve_hook(lm, hook_name)
    own = args.dataset is None or args.dataset == metadata.get("dataset_path")
    known = metadata if own else {}
    text = load_text(
        args.dataset or known.get("dataset_path"),
        split=args.split or known.get("dataset_split") or "train",
        text_column=args.text_column or known.get("text_column"),
    )
    seed = known.get("held_out_seed", 0)
    held_out = text if args.all_documents else split_documents(text, seed=seed)[1]
    length = metadata.get("context_size") or 128
    tokens = tokenize(held_out, lm.tokenizer, context_size=length, n_tokens=args.tokens)
    special = metadata.get("drop_special", True) if args.drop_special is None else args.drop_special
    multiple = args.massive_multiple or metadata.get("massive_multiple", 10.0) or math.inf
    with ProgressBar() as bar:
        reports = evaluate_on_text(
            saes,
            lm,
            hook,
            tokens,
            drop_special=special,
            skip_first=metadata.get("skip_first", RowRules.skip_first),
            massive_multiple=multiple,
            nonfinite=metadata.get("nonfinite", RowRules.nonfinite),
            progress=lambda done, total: bar("evaluate", done, total, {}),
        )
    for name, report in reports.items():
        if len(reports) > 1:
            print(f"\n{name}")
        print(report_table(report))
    if len(reports) > 1:
        print()
        print(comparison_table(reports))
    if args.out is not None:
        write_json(args.out, reports if len(reports) > 1 else reports[str(args.sae[0])])
        print(f"written to {args.out}")


MUST_AGREE = (
    *("hook_name", "model_name", "dataset_path", "dataset_split", "text_column"),
    *("held_out_seed", "context_size", "skip_first", "drop_special", "massive_multiple"),
)
"""What SAEs that are evaluated on the same rows have in common."""


def _shared_metadata(saes: dict[str, SAE], must_agree: tuple[str, ...]) -> dict[str, Any]:
    """What the SAEs say of their rows; what one of them does not know another may."""
    shared: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for name, sae in saes.items():
        for key, value in sae.cfg.metadata.items():
            if key in must_agree and shared.get(key, value) != value:
                raise ValueError(
                    f"sae must be SAEs of the same {key} to be evaluated together, got "
                    f"{shared[key]!r} in {said_by[key]} and {value!r} in {name}"
                )
            if key not in shared:
                shared[key], said_by[key] = value, name
    return shared


def harvest_rows(run: HarvestRun) -> None:
    """Write activations to a folder, to train from without the model; goes on after a kill."""
    with ProgressBar() as bar:
        index = harvest_to_disk(run, lambda stage, done, total: bar(stage, done, total, {}))
    n_bytes = sum(shard.n_bytes for shard in index.shards)
    widths = ", ".join(f"{hook} [{index.rows}, {d}]" for hook, d in index.widths.items())
    print(f"{index.dtype} rows of {index.contexts * run.context_size} tokens: {widths}")
    print(f"{len(index.shards)} shards, {n_bytes / 1e9:.3g} GB")
    print(f"fastsae train --activations {run.out} --hook {next(iter(index.widths))}")


def plot(args: Plot) -> None:
    """Draw a run's curves and the density of its latents."""
    out = args.out or args.run / "curves.png"
    plot_run(out, read_log(args.run / "metrics.jsonl"), density_of_run(args.run))
    print(f"written to {out}")


def convert_saved(args: Convert) -> None:
    """Write a saved SAE in another library's format."""
    print(convert(args))


def plan(args: Plan) -> None:
    """Say what a dictionary takes on a number of GPUs: memory, traffic, time."""
    print(plan_report(args))


def bench(arguments: list[str]) -> None:
    """Compare training steps and whole jobs with other libraries; runs from a clone.

    Raises:
        RuntimeError: the benchmarks are not here, since fastsae was installed as a package.
    """
    if not (Path("bench") / "__main__.py").is_file():
        raise RuntimeError(
            "bench must be run from the root of a clone of the repository: the benchmarks are no "
            f"part of the installed package, got {Path.cwd()}"
        )
    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module("bench.__main__").main(arguments)


def demo(args: Demo) -> None:
    """Train, evaluate, save and picture a small SAE offline, in a few minutes on two cores."""
    started = time.perf_counter()
    out = args.out
    number = 2
    while (out / "run.json").exists():
        out, number = args.out.with_name(f"{args.out.name}-{number}"), number + 1
    run = LanguageModelRun(
        out=out,
        layer=args.layer,
        tokens=args.tokens,
        harvest_tokens=args.harvest_tokens,
        sae={"d_sae": args.d_sae, "k": args.k},
        eval_tokens=4096,
        seed=args.seed,
        device=args.device,
    )
    print(f"SmolLM2-135M, residual stream after layer {args.layer}, Wikipedia articles -> {out}")
    train(run)
    print(f"the whole demonstration took {time.perf_counter() - started:.0f} s")


def _finish(out: Path, trained: Trained) -> None:
    """Print the table, draw the picture, say where things are."""
    examples = None
    if trained.lm is not None and trained.held_out is not None:
        latents = interesting_latents(trained.density, EXAMPLE_LATENTS)
        examples = top_tokens(trained.sae, trained.lm, trained.held_out, latents, n_examples=4)
    log = read_log(out / "metrics.jsonl")
    plot_run(out / "run.png", log, trained.density, examples)
    print(report_table(trained.report))
    print(verdict_table([Verdict(**verdict) for verdict in trained.report["verdicts"]]))
    never = int((trained.density == 0).sum())
    print(f"never fired in training: {never} of {len(trained.density)} latents")
    print(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in trained.timings.items()))
    print(f"SAE in SAELens's format: {out / 'sae'}; log: {out / 'metrics.jsonl'}")
    print(f"evaluation: {out / 'eval.json'}; picture: {out / 'run.png'}")


def _variant_in(arguments: list[str]) -> str:
    """The variant asked for, which decides what other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--variant", nargs="?")
    asked = parser.parse_known_args(arguments)[0].variant
    return asked if asked in SAES else LanguageModelRun.variant


def _train_options(variant: str) -> Callable[[Any], None]:
    """`train` with an option for each field of the run and of the variant's configuration."""
    conf = require("tyro", "train").conf
    config_class = SAES[variant].config_class
    as_they_are = {"__post_init__": lambda _: None}  # checked when the real ones are made
    Options = make_dataclass(
        config_class.__name__,
        [
            *((name, conf.Suppress[Any], None) for name in SET_BY_THE_RUN),
            ("d_sae", int | None, None),
        ],
        bases=(config_class,),
        kw_only=True,
        frozen=True,
        namespace=as_they_are,
    )
    Run = make_dataclass(
        LanguageModelRun.__name__,
        [
            ("variant", Literal[tuple(SAES)], LanguageModelRun.variant),
            ("also", conf.UseAppendAction[tuple[str, ...]], ()),
            ("sae", Options, field(default=Options(**defaults.sae_fields(variant)))),
        ],
        bases=(LanguageModelRun,),
        kw_only=True,
        frozen=True,
        namespace={**as_they_are, "__doc__": LanguageModelRun.__doc__},
    )

    def train_variant(run: Any) -> None:
        sae = {k: v for k, v in vars(run.sae).items() if k not in SET_BY_THE_RUN}
        also = tuple(changes_in(text) for text in run.also)
        train(LanguageModelRun(**{**vars(run), "sae": sae, "also": also}))

    train_variant.__annotations__["run"] = Run
    train_variant.__doc__ = train.__doc__
    return train_variant


def _positional(options: Any, command: Callable[[Any], None]) -> Callable[[Any], None]:
    """A command whose required options are plain arguments."""
    conf = require("tyro", "train").conf

    def run(args: Any) -> None:
        command(args)

    run.__annotations__["args"] = conf.PositionalRequiredArgs[options]
    run.__doc__ = command.__doc__
    return run


def main(arguments: list[str] | None = None) -> None:
    """Entry point; an error is one line on standard error and exit status 1.

    A run that is asked to stop saves and exits with status 75.
    """
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] == ["bench"]:  # has options of its own
            return bench(arguments[1:])
        tyro = require("tyro", "train")
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": _train_options(_variant_in(arguments)),
                "harvest": harvest_rows,
                "eval": evaluate_saved,
                "plot": _positional(Plot, plot),
                "convert": _positional(Convert, convert_saved),
                "plan": plan,
                "bench": bench,
                "demo": demo,
            },
            prog="fastsae",
            description="Sparse autoencoders for language models.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except Interrupted as interrupted:
        print(f"fastsae: {interrupted}; go on with --resume", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"fastsae: error: {error}", file=sys.stderr, flush=True)
        if is_one_of_several():  # what waits for the others would never end
            os._exit(1)
        sys.exit(1)


if __name__ == "__main__":
    main()
