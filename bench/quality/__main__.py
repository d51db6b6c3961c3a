"""Quality of the trained SAE at equal tokens: ours with its defaults against SAELens.

    python -m bench.quality                    # all parts on both models; resumes where it stopped
    python -m bench.quality --parts compare --sources smollm2-135m --architectures topk
    python -m bench.quality --report           # the tables of the rows so far
    python -m bench.quality --sample           # write bench/data/, the rows `bench.gpu_check` reads

search     as many random trials of hyperparameters for SAELens as for us, on validation rows
compare    our defaults, SAELens's and SAELens's best trial, on test documents, as saved SAEs
ablation   one change of our defaults at a time, on validation rows
synthetic  recovery of a known dictionary

All methods train on the same filtered rows of a real model's residual stream, in the same order for
a seed. SAELens's trainer runs with our arithmetic inside (`accelerate`; its losses and gradients to
rounding), but for the method sae-lens-tuned-own, for whose training time it is not.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.quality.data import CACHE, SOURCES, load_data, save_sample
from bench.quality.methods import TRAINERS, Options, Setting, Watch
from bench.quality.report import report
from bench.quality.scores import fvu, match, score
from bench.quality.search import ABLATIONS, SEED, our_defaults, trial
from bench.record import RESULTS, append
from fastsae import SAE

FILE = "quality"
PARTS = ("search", "compare", "ablation", "synthetic")
METHODS = ("fastsae", "sae-lens", "sae-lens-tuned", "sae-lens-tuned-own")
COMPARED = METHODS[:3]
ON_SYNTHETIC = ("fastsae", "sae-lens", "sae-lens-our-schedule")
"""No search is made there."""
EXPANSION, K = 8, 32
Row = dict[str, Any]


def saved_rows() -> list[Row]:
    path = RESULTS / f"{FILE}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_done(row: Row) -> bool:
    """Whether a row with these fields is there."""
    return any(all(saved.get(n) == value for n, value in row.items()) for saved in saved_rows())


def keep(row: Row) -> None:
    append(FILE, [row])
    print({name: value for name, value in row.items() if name != "curve"}, flush=True)


def tuned(setting: Setting) -> Options:
    """SAELens's best trial on TopK SAEs of the same rows."""
    tried = [
        r
        for r in saved_rows()
        if r["bench"] == "quality-search"
        and r["library"] == "sae-lens"
        and r["setting"] == vars(replace(setting, architecture="topk"))
    ]
    if not tried:
        raise SystemExit(
            f"SAELens must be tuned before it is compared with, got no trial for {setting}: "
            "--parts search --architectures topk"
        )
    return min(tried, key=lambda r: r["fvu"])["options"]


def recipe(method: str, setting: Setting) -> tuple[str, Options]:
    """A library and its options; of ours, what the defaults are now."""
    if method == "fastsae":
        return method, our_defaults(setting)
    if method == "sae-lens":
        return method, {}
    if method == "sae-lens-our-schedule":
        return "sae-lens", trial("sae-lens", 1, setting)
    own = {"own": True} if method.endswith("-own") else {}
    return "sae-lens", {**tuned(setting), **own}


class Bench:
    """One model's rows, and what is trained on them."""

    def __init__(self, source: str, cache: Path) -> None:
        self.source, self.cache = SOURCES[source], cache
        self.data = load_data(self.source, cache)
        self._lm: Any = None

    def setting(self, architecture: str, tokens: int) -> Setting:
        return Setting(self.source.name, architecture, EXPANSION * self.data.d_in, K, tokens)

    def validated(self, setting: Setting, library: str, options: Options, seed: int) -> Row:
        """A training whose FVU on the validation rows is all that is asked."""
        clock = Watch(validation=self.data.validation.kept, every=10**9)
        outcome = TRAINERS[library](setting, self.data.train, seed, clock, options)
        found = fvu(outcome.sae, self.data.validation.kept)
        return {**found, "never_fired": outcome.never_fired, "seconds": round(clock.seconds, 1)}

    def search(self, setting: Setting, trials: int) -> None:
        for number in range(trials):
            for library in TRAINERS:
                options = trial(library, number, setting)
                row = {"bench": "quality-search", "setting": vars(setting), "library": library}
                row |= {"trial": number, "options": options}
                if not is_done(row):
                    keep(row | self.validated(setting, library, options, SEED))

    def ablation(self, setting: Setting, seeds: int) -> None:
        for seed in range(SEED, SEED + seeds):
            for change, changed in ABLATIONS.items():
                options = {**our_defaults(setting), **changed}
                row = {"bench": "quality-ablation", "setting": vars(setting)}
                row |= {"change": change, "seed": seed, "options": options}
                if not is_done(row):
                    keep(row | self.validated(setting, "fastsae", options, seed))

    def compare(self, setting: Setting, methods: list[str], seeds: int) -> None:
        for seed in range(seeds):
            for method in methods:
                library, options = recipe(method, setting)
                row = {"bench": "quality", "setting": vars(setting), "method": method, "seed": seed}
                row["options"] = options
                if is_done(row):
                    continue
                clock = Watch(validation=self.data.validation.kept)
                outcome = TRAINERS[library](setting, self.data.train, seed, clock, options)
                clock.measure(outcome.sae)
                row["never_fired"] = outcome.never_fired
                row |= score(outcome.sae, self.data, self.source, *self.language_model())
                folder = self._folder(setting, method)
                outcome.sae.save_model(folder / f"{seed}")
                if seed and (folder / "0").exists():
                    other = SAE.load_from_disk(folder / "0")
                    row["decoder_match"] = match(outcome.sae.W_dec, other.W_dec)
                keep(row | {"seconds": round(clock.seconds, 1), "curve": clock.curve})

    def language_model(self) -> Any:
        if self._lm is None:
            self._lm = self.source.load()
        return self._lm

    def _folder(self, setting: Setting, method: str) -> Path:
        name = "-".join(str(value) for value in vars(setting).values())
        return self.cache / "saes" / name / method


def synthetic(seeds: int, architectures: list[str]) -> None:
    from bench.quality.synthetic import recovery, setting_of

    for architecture in architectures:
        for seed in range(seeds):
            for method in ON_SYNTHETIC:
                setting = setting_of(architecture)
                library, options = recipe(method, setting)
                row = {"bench": "quality-synthetic", "setting": vars(setting), "method": method}
                row |= {"seed": seed, "options": options}
                if not is_done(row):
                    keep(row | recovery(library, options, architecture, seed))


def runs(args: argparse.Namespace) -> Iterator[tuple[Bench, int]]:
    for source in args.sources:
        bench = Bench(source, args.cache)
        for tokens in args.tokens:
            yield bench, tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--architectures", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[800_000, 400_000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--sample", action="store_true", help="only write the sample of the rows")
    args = parser.parse_args(arguments)
    if args.sample:
        return save_sample(load_data(SOURCES["smollm2-135m"], args.cache).train)
    if not args.report:
        for bench, tokens in runs(args):
            topk = bench.setting("topk", tokens)
            if "search" in args.parts:  # what is found on TopK is used for the others too
                bench.search(topk, args.trials)
            if "compare" in args.parts:
                for architecture in args.architectures:
                    bench.compare(bench.setting(architecture, tokens), args.methods, args.seeds)
            if "ablation" in args.parts:
                bench.ablation(topk, args.seeds)
        if "synthetic" in args.parts:
            synthetic(args.seeds, args.architectures)
    print(report(saved_rows()))


if __name__ == "__main__":
    main()
