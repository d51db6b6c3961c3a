"""Quality of the trained SAE at equal tokens: ours with its defaults against SAELens.

    python -m bench.quality                    # all parts on both models; resumes where it stopped
    python -m bench.quality --parts search compare --sources smollm2-135m --architectures topk
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
from functools import partial
from pathlib import Path
from typing import Any

from bench.quality.data import CACHE, SOURCES, load_data, save_sample
from bench.quality.methods import TRAINERS, Options, Setting, Watch
from bench.quality.results import once, saved
from bench.quality.scores import fvu, match, redundancy, score
from bench.quality.search import ABLATIONS, RECIPES, SEED, our_defaults, trial
from bench.report.quality import report
from bench.report.rows import Row
from fastsae import SAE

PARTS = ("search", "compare", "ablation", "synthetic")
COMPARED = ("fastsae", "sae-lens", "sae-lens-tuned")
ON_SYNTHETIC = ("fastsae", "fastsae-random", "sae-lens", "sae-lens-our-schedule")
"""No search is made there."""
EXPANSION, K = 8, 32


class Bench:
    """One model's rows, and what is trained on them."""

    def __init__(self, source: str, cache: Path) -> None:
        self.source, self.cache = SOURCES[source], cache
        self.data = load_data(self.source, cache)
        self._lm: Any = None

    def setting(self, architecture: str, tokens: int) -> Setting:
        return Setting(self.source.name, architecture, EXPANSION * self.data.d_in, K, tokens)

    def search(self, setting: Setting, trials: int) -> None:
        for number in range(trials):
            for library in TRAINERS:
                options = trial(library, number, setting)
                key = {"bench": "quality-search", "setting": vars(setting), "library": library}
                key |= {"trial": number, "options": options}
                once(key, partial(self._validated, setting, library, options, SEED))

    def ablation(self, setting: Setting, seeds: int) -> None:
        ours = our_defaults(setting)
        for seed in range(SEED, SEED + seeds):
            for change, changed in ABLATIONS.items():
                options = {**ours, **changed(ours)}
                key = {"bench": "quality-ablation", "setting": vars(setting), "change": change}
                key |= {"seed": seed, "options": options}
                once(key, partial(self._validated, setting, "fastsae", options, seed))

    def compare(self, setting: Setting, methods: list[str], seeds: int) -> None:
        for seed in range(seeds):
            for method in methods:
                options = RECIPES[method][1](setting)
                key = {"bench": "quality", "setting": vars(setting), "method": method}
                key |= {"seed": seed, "options": options}
                once(key, partial(self._tested, setting, method, options, seed))

    def _validated(self, setting: Setting, library: str, options: Options, seed: int) -> Row:
        """A training that is looked at on the validation rows, at its end."""
        validation = self.data.validation.kept
        clock = Watch(validation=validation, every=10**9)
        outcome = TRAINERS[library](setting, self.data.train, seed, clock, options)
        return {
            **fvu(outcome.sae, validation),
            **redundancy(outcome.sae.W_dec),
            "never_fired": outcome.never_fired,
            "seconds": round(clock.seconds, 1),
        }

    def _tested(self, setting: Setting, method: str, options: Options, seed: int) -> Row:
        """A training with its curve on validation rows, and its scores on test documents."""
        clock = Watch(validation=self.data.validation.kept)
        train = TRAINERS[RECIPES[method][0]]
        outcome = train(setting, self.data.train, seed, clock, options)
        clock.measure(outcome.sae)
        if self._lm is None:
            self._lm = self.source.load()
        found = score(outcome.sae, self.data, self.source, *self._lm)
        name = "-".join(str(value) for value in vars(setting).values())
        folder = self.cache / "saes" / name / method
        outcome.sae.save_model(folder / f"{seed}")
        if seed and (folder / "0").exists():
            other = SAE.load_from_disk(folder / "0")
            found["decoder_match"] = match(outcome.sae.W_dec, other.W_dec)
        return {
            **found,
            "never_fired": outcome.never_fired,
            "seconds": round(clock.seconds, 1),
            "curve": clock.curve,
        }


def synthetic(seeds: int, architectures: list[str]) -> None:
    from bench.quality.synthetic import recovery, setting_of

    for architecture in architectures:
        setting = setting_of(architecture)
        for seed in range(seeds):
            for method in ON_SYNTHETIC:
                library, options_of = RECIPES[method]
                options = options_of(setting)
                key = {"bench": "quality-synthetic", "setting": vars(setting), "method": method}
                key |= {"seed": seed, "options": options}
                once(key, partial(recovery, library, options, architecture, seed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--architectures", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[400_000, 200_000])
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(COMPARED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--sample", action="store_true", help="only write the sample of the rows")
    args = parser.parse_args(arguments)
    if args.sample:
        return save_sample(load_data(SOURCES["smollm2-135m"], args.cache).train)
    if not args.report:
        for source in args.sources:
            bench = Bench(source, args.cache)
            for tokens in args.tokens:
                topk = bench.setting("topk", tokens)
                if "search" in args.parts:  # what is found on TopK is used for the others too
                    bench.search(topk, args.trials)
                if "compare" in args.parts:
                    for architecture in args.architectures:
                        setting = bench.setting(architecture, tokens)
                        bench.compare(setting, args.methods, args.seeds)
                if "ablation" in args.parts:
                    bench.ablation(topk, args.seeds)
        if "synthetic" in args.parts:
            synthetic(args.seeds, args.architectures)
    print(report(saved()))


if __name__ == "__main__":
    main()
