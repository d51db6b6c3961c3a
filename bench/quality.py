"""Quality of the trained SAE at equal tokens: ours with its defaults against SAELens.

    python -m bench.quality                    # every method, three seeds; resumes where it stopped
    python -m bench.quality --report           # the table of the rows so far
    python -m bench.quality --sample           # write bench/data/, the rows `bench.gpu_check` reads

All methods train on the same rows of SmolLM2-135M's residual stream, in the same order for a seed,
and are evaluated as saved inference SAEs on held-out articles. Seconds count training steps only:
activations are in memory, evaluations stop the clock.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.cases import SAMPLE
from bench.clock import Clock, held_out_fvu, seconds_to
from bench.providers.base import quiet
from bench.providers.sae_lens import sae_lens_config
from bench.record import RESULTS, append
from fastsae import SAE, TopKConfig, TrainConfig, Trainer
from fastsae.data import (
    HookPoint,
    LanguageModel,
    RowFilter,
    harvest,
    load_language_model,
    load_text,
    resid_hook_name,
    resolve_hook,
    split_documents,
    tokenize,
)
from fastsae.data.batches import ShuffledRows
from fastsae.evaluation import ReconstructionMetrics, loss_recovered
from fastsae.training.scaling import AverageNorm

FILE = "quality"
CURVE_STEPS = 25
"""Evaluations of the held-out FVU over a run."""


@dataclass(frozen=True)
class Setting:
    """What every method shares."""

    layer: int
    d_sae: int
    k: int
    tokens: int
    ce_contexts: int


@dataclass
class Data:
    train: Tensor
    held_out: Tensor
    ce_tokens: Tensor
    norm_limit: float


@dataclass
class Watch(Clock):
    """Training seconds, and the held-out FVU on the way."""

    held_out: Tensor = field(kw_only=True)
    every: int = 1

    def look(self, step: int, forward: Callable[[Tensor], Tensor]) -> None:
        if step and step % self.every == 0:
            self.measure(forward)

    def measure(self, forward: Callable[[Tensor], Tensor]) -> None:
        fvu = held_out_fvu(forward, self.held_out)
        self.curve.append((round(self.seconds, 2), round(fvu, 5)))


@dataclass(frozen=True)
class Outcome:
    sae: SAE
    never_fired: float


def train_fastsae(setting: Setting, data: Data, seed: int, clock: Watch) -> Outcome:
    sae_cfg = TopKConfig(
        d_in=data.train.shape[1],
        d_sae=setting.d_sae,
        k=setting.k,
        normalize_activations="expected_average_only_in",
    )
    run = TrainConfig(sae=sae_cfg, total_tokens=setting.tokens, seed=seed)
    trainer = Trainer(run, device="cpu")
    scaling = trainer.scaling
    assert isinstance(scaling, AverageNorm)
    cfg = trainer.cfg
    clock.every = max(1, cfg.total_steps // CURVE_STEPS)
    batches = ShuffledRows(data.train, cfg.batch_size or 1, seed)

    def timed() -> Iterator[Tensor]:
        for step in range(cfg.total_steps):
            if step:
                clock.stop()
            scale = scaling.factor
            clock.look(step, lambda x, s=scale: trainer.sae(x * s) / s)
            batch = batches.batch(step)
            clock.start()
            yield batch

    sae = trainer.fit(timed(), sample=data.train[:: max(1, len(data.train) // 65_536)])
    clock.stop()
    return Outcome(sae, float((trainer.dead.fired == 0).float().mean()))


def train_sae_lens(
    setting: Setting,
    data: Data,
    seed: int,
    clock: Watch,
    *,
    batch_size: int,
    lr: float,
    scaled: bool,
    dead_window: int,
) -> Outcome:
    with quiet():
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=data.train.shape[1],
            d_sae=setting.d_sae,
            k=setting.k,
            normalize_activations="expected_average_only_in" if scaled else "none",
        )
    )
    with quiet():
        tokens = setting.tokens // batch_size * batch_size
        cfg = sae_lens_config(tokens, batch_size, lr, dead_window=dead_window)
    clock.every = max(1, setting.tokens // batch_size // CURVE_STEPS)
    batches = ShuffledRows(data.train, batch_size, seed)

    def timed() -> Iterator[Tensor]:
        for step in range(cfg.n_batches_for_norm_estimate if scaled else 0):
            yield batches.batch(step)
        for step in range(setting.tokens // batch_size):
            if step:
                clock.stop()
            scale = trainer.activation_scaler.scaling_factor or 1.0
            clock.look(step, lambda x, s=scale: sae(x * s) / s)
            batch = batches.batch(step)
            clock.start()
            yield batch

    trainer = SAETrainer(cfg, sae, timed())
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer.fit()
        clock.stop()
        sae.save_inference_model(folder)
        found = SAE.load_from_disk(folder)
    return Outcome(found, float((trainer.act_freq_scores == 0).float().mean()))


def sae_lens_default(setting: Setting, data: Data, seed: int, clock: Watch) -> Outcome:
    options = {"batch_size": 4096, "lr": 3e-4, "scaled": False, "dead_window": 1000}
    return train_sae_lens(setting, data, seed, clock, **options)


def sae_lens_tuned(setting: Setting, data: Data, seed: int, clock: Watch) -> Outcome:
    options = {"batch_size": 1024, "lr": 1e-3, "scaled": True, "dead_window": 200}
    return train_sae_lens(setting, data, seed, clock, **options)


METHODS: dict[str, Callable[[Setting, Data, int, Watch], Outcome]] = {
    "fastsae": train_fastsae,
    "sae-lens-tuned": sae_lens_tuned,
    "sae-lens": sae_lens_default,
}


def load_data(setting: Setting, lm: LanguageModel, hook: HookPoint, cache: Path) -> Data:
    """Harvest once, or read back what an earlier call harvested."""
    path = cache / f"smollm2-135m-layer{setting.layer}.safetensors"
    if not path.exists():
        train, held_out = split_documents(load_text())
        parts = {}
        for name, text in (("train", train), ("held_out", held_out)):
            tokens = tokenize(text, lm.tokenizer)
            parts[name] = harvest(lm, hook, tokens, progress=_show(name))
        cache.mkdir(parents=True, exist_ok=True)
        tensors = {name: a.rows.contiguous() for name, a in parts.items()}
        tensors["held_out_tokens"] = parts["held_out"].tokens.contiguous()
        tensors["norm_limit"] = torch.tensor(parts["train"].norm_limit)
        save_file(tensors, path)
    tensors = load_file(path)
    ce_tokens = tensors["held_out_tokens"][: setting.ce_contexts]
    return Data(tensors["train"], tensors["held_out"], ce_tokens, float(tensors["norm_limit"]))


def save_sample(train: Tensor) -> None:
    """8,192 rows of `train` [N, D] at equal distances, in fp16: 9.4 MB at D = 576."""
    picked = torch.arange(8192) * len(train) // 8192
    SAMPLE.parent.mkdir(exist_ok=True)
    save_file({"rows": train[picked].half().contiguous()}, SAMPLE)


@torch.no_grad()
def score(outcome: Outcome, data: Data, lm: LanguageModel, hook: HookPoint) -> dict[str, float]:
    metrics = ReconstructionMetrics(data.held_out.shape[1], outcome.sae.cfg.d_sae)
    for x in data.held_out.split(2048):
        code = outcome.sae.encode_sparse(x)
        metrics.update(x, outcome.sae.decode(code), code.indices, code.acts)
    found = metrics.result()
    rows = RowFilter(skip_first=1, norm_limit=data.norm_limit)
    ce = loss_recovered(
        lm, hook, data.ce_tokens, outcome.sae, row_filter=rows, every_position=False
    )
    return {
        "fvu": found["fvu"],
        "l0": found["l0"],
        "ce_loss_score": ce.ce_loss_score,
        "ce_spliced": ce.ce_spliced,
        "ce_clean": ce.ce_clean,
        "never_fired": outcome.never_fired,
    }


def report(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds; seconds until SAELens tuned's final FVU is reached."""
    lines = [
        f"{'method':16}{'seeds':>6}{'FVU':>9}{'+-':>8}{'CE score':>10}{'never fired':>13}"
        f"{'seconds':>9}{'to tuned FVU':>14}"
    ]
    tuned = {r["seed"]: r for r in rows if r["method"] == "sae-lens-tuned"}
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method]
        if not mine:
            continue
        mean = lambda key, rows=mine: statistics.mean(r[key] for r in rows)
        spread = statistics.stdev([r["fvu"] for r in mine]) if len(mine) > 1 else 0.0
        reached = [
            seconds_to(r["curve"], tuned[r["seed"]]["curve"][-1][1])
            for r in mine
            if r["seed"] in tuned
        ]
        known = [s for s in reached if s is not None]
        text = f"{statistics.mean(known):.0f} s" if known and len(known) == len(reached) else "-"
        lines.append(
            f"{method:16}{len(mine):6}{mean('fvu'):9.4f}{spread:8.4f}{mean('ce_loss_score'):10.4f}"
            f"{mean('never_fired'):13.2%}{mean('seconds'):9.0f}{text:>14}"
        )
    return "\n".join(lines)


def saved_rows(setting: Setting) -> list[dict[str, Any]]:
    path = RESULTS / f"{FILE}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in rows if r["setting"] == vars(setting)]


def _show(name: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done == total or done // 51_200 != (done - 2048) // 51_200:
            print(f"harvest {name}: {done} of {total} tokens", flush=True)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--ce-contexts", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"))
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--sample", action="store_true", help="only write the sample of the rows")
    args = parser.parse_args()
    setting = Setting(args.layer, args.d_sae, args.k, args.tokens, args.ce_contexts)
    if not args.report:
        lm = load_language_model()
        hook = resolve_hook(lm, resid_hook_name(setting.layer))
        data = load_data(setting, lm, hook, args.cache)
        if args.sample:
            return save_sample(data.train)
        for seed in range(args.seeds):
            for method in args.methods:
                done = {(r["method"], r["seed"]) for r in saved_rows(setting)}
                if (method, seed) in done:
                    continue
                clock = Watch(held_out=data.held_out)
                outcome = METHODS[method](setting, data, seed, clock)
                scores = score(outcome, data, lm, hook)
                clock.measure(outcome.sae)
                row = {"bench": FILE, "method": method, "seed": seed, "setting": vars(setting)}
                row |= {**scores, "seconds": round(clock.seconds, 1), "curve": clock.curve}
                append(FILE, [row])
                print({k: v for k, v in row.items() if k not in ("curve", "setting")}, flush=True)
    print(report(saved_rows(setting)))


if __name__ == "__main__":
    main()
