"""The whole job, language model included: text to trained SAEs, ours and the peers'.

    python -m bench.end_to_end                        # 60,000 tokens, layer 9 of SmolLM2-135M
    python -m bench.end_to_end --layers 5 9 13        # an SAE each
    python -m bench.end_to_end --tokens 1000000 --methods fastsae sae-lens
    python -m bench.end_to_end --methods fastsae sae-lens sae-lens-flags   # its flags for speed

Every method gets the same contexts of the same articles, one pass over them, one SAE a layer, in
steps of 256 rows: so few tokens are too few larger ones for anybody's SAE to learn.
Seconds run from the loaded model to the trained SAEs in memory. The saved SAEs are then evaluated
by our evaluation on held-out articles; figures of several layers are means. With `--turns 2` all
methods run again in the other order, and seconds are means. `to_its_fvu` is how long ours took to
the held-out FVU that the method ended with: evaluations stop the clock.
`fraction` is the throughput of the whole run over that of its slower half, the model's bare
forward pass up to the last layer or training on rows in memory.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.clock import Clock, held_out_fvu, seconds_to
from bench.measure import why
from bench.providers import PROVIDERS
from bench.providers.base import quiet
from bench.providers.sparsify import without_its_kernels
from bench.record import append
from fastsae import SAE, DataConfig, TopKConfig, TrainConfig, Trainer
from fastsae.data import (
    Activations,
    HookPoint,
    LanguageModel,
    harvest_all,
    load_language_model,
    load_text,
    resid_hook_name,
    resolve_hook,
    split_documents,
    tokenize,
)
from fastsae.data.batches import ShuffledRows
from fastsae.data.hooks import capture_all
from fastsae.evaluation.evaluate import evaluate
from fastsae.interop.formats import load_sae
from fastsae.training.group import TrainerGroup

CONTEXT, BATCH = 128, 256
MODEL_CONTEXTS = 16
"""Contexts of one forward pass."""
LOOKS = 12
"""Evaluations of the held-out FVU over a run."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every method is given."""

    lm: LanguageModel
    layers: list[int]
    hooks: list[HookPoint]
    contexts: Tensor
    """[N, CONTEXT] token ids."""
    held_out: list[Activations]
    """By layer."""
    d_sae: int
    k: int
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.contexts.numel()

    @property
    def config(self) -> TrainConfig:
        """Ours, with its defaults."""
        sae = TopKConfig(d_in=self.lm.d_model, d_sae=self.d_sae, k=self.k)
        data = DataConfig(total_tokens=self.tokens, batch_size=BATCH)
        return TrainConfig(sae=sae, data=data)


def prepare(
    layers: list[int], tokens: int, d_sae: int, k: int, held_out: int, device: str = "cpu"
) -> Job:
    lm = load_language_model(device=device)
    hooks = [resolve_hook(lm, resid_hook_name(layer)) for layer in layers]
    train, rest = split_documents(load_text())
    cut = partial(tokenize, tokenizer=lm.tokenizer, context_size=CONTEXT)
    n_tokens = -(-tokens // BATCH) * BATCH  # whole batches for everybody
    contexts = cut(train, n_tokens=n_tokens)[: n_tokens // CONTEXT]
    unseen = harvest_all(lm, hooks, cut(rest, n_tokens=held_out))
    return Job(lm, layers, hooks, contexts, unseen, d_sae, k, device)


def mean_fvu(job: Job, saes: Iterable[SAE]) -> float:
    """Over the layers, on held-out rows."""
    pairs = zip(saes, job.held_out, strict=True)
    return mean(held_out_fvu(sae, one.rows.to(sae.device, torch.float32)) for sae, one in pairs)


def run_fastsae(job: Job, clock: Clock) -> list[SAE]:
    """Harvest all layers in one pass, then train side by side on the rows shuffled."""
    found = harvest_all(job.lm, job.hooks, job.contexts)
    rows = {hook.name: one.rows for hook, one in zip(job.hooks, found, strict=True)}
    group = TrainerGroup({name: job.config for name in rows}, device=job.device)
    drawn = {name: ShuffledRows(one, BATCH) for name, one in rows.items()}
    every = max(1, group.total_steps // LOOKS)

    def look() -> None:
        with clock.stopped():
            saes = [trainer.export() for trainer in group.trainers.values()]
            clock.curve.append((clock.seconds, mean_fvu(job, saes)))

    def batches() -> Iterator[dict[str, Tensor]]:
        for step in range(group.total_steps):
            if step and step % every == 0:
                look()
            yield {name: one.batch(step) for name, one in drawn.items()}

    saes = group.fit(batches(), sample=rows)
    look()
    return [*saes.values()]


def run_sae_lens(job: Job, clock: Clock, **flags: bool) -> list[SAE]:
    """Its runner on a TransformerBridge, which trains one layer a run.

    Args:
        flags: further options of its runner. Seconds include what these compile.
    """
    return [_sae_lens_at(job, layer, clock, flags) for layer in job.layers]


def _sae_lens_at(job: Job, layer: int, clock: Clock, flags: dict[str, Any]) -> SAE:
    """On the same contexts, pretokenised."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from transformer_lens.model_bridge import TransformerBridge

    with clock.stopped():
        own = load_language_model(device=job.device)  # a bridge takes its model apart
        bridge: Any = TransformerBridge.boot_transformers(
            str(own.model.config.name_or_path), hf_model=own.model, tokenizer=own.tokenizer
        )
    sae = TopKTrainingSAEConfig(
        d_in=job.lm.d_model,
        d_sae=job.d_sae,
        k=job.k,
        normalize_activations="expected_average_only_in",
    )
    with tempfile.TemporaryDirectory() as folder:
        cfg = LanguageModelSAERunnerConfig(
            sae=sae,
            model_name="smollm2",
            hook_name=resid_hook_name(layer),
            dataset_path="",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=CONTEXT,
            prepend_bos=False,
            training_tokens=job.tokens,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=MODEL_CONTEXTS,
            n_batches_in_buffer=64,  # contexts: 8,192 rows
            n_batches_for_norm_estimate=8,
            prefetch_llm_batches=True,
            lr=1e-3,
            device=job.device,
            logger=LoggingConfig(log_to_wandb=False),
            n_eval_batches=1,
            output_path=folder,
            checkpoint_path=None,
            verbose=False,
            **flags,
        )
        dataset = Dataset.from_dict({"input_ids": job.contexts.tolist()})
        runner = LanguageModelSAETrainingRunner(
            cfg, override_dataset=dataset, override_model=bridge
        )
        runner.run()
        return SAE.load_from_disk(folder, device=job.device)


def run_sparsify(job: Job, clock: Clock) -> list[SAE]:
    """Its trainer, which takes all layers in one run."""
    without_its_kernels()
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    dataset = Dataset.from_dict({"input_ids": job.contexts.tolist()}).with_format("torch")
    hookpoints = [f"layers.{layer}" for layer in job.layers]
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=job.d_sae, k=job.k),
            batch_size=BATCH // CONTEXT,
            optimizer="adam",
            lr_warmup_steps=10,
            hookpoints=hookpoints,
            log_to_wandb=False,
            save_dir=folder,
            run_name="run",
        )
        with clock.stopped():
            model = load_language_model(device=job.device).model
        trainer = Trainer(cfg, dataset, model)
        trainer.fit()
        for hookpoint in hookpoints:
            trainer.saes[hookpoint].save_to_disk(Path(folder) / hookpoint)
        return [load_sae(Path(folder) / hookpoint, job.device) for hookpoint in hookpoints]


SAE_LENS_FLAGS = {"autocast": True, "autocast_lm": True, "compile_llm": True, "compile_sae": True}
"""Its flags for speed, beside the prefetch that it always has. They are meant for a GPU: many CPUs
emulate the products of bf16, and torch.compile traces a bridge's hooks for minutes on a CPU's core
before the first rows come."""
METHODS: dict[str, Callable[[Job, Clock], list[SAE]]] = {
    "fastsae": run_fastsae,
    "sae-lens": run_sae_lens,
    "sae-lens-flags": partial(run_sae_lens, **SAE_LENS_FLAGS),
    "sparsify": run_sparsify,
}


def default_methods(device: str) -> list[str]:
    """All; on a CPU not SAELens with flags that are meant for a GPU."""
    return [name for name in METHODS if name != "sae-lens-flags" or device == "cuda"]


def seconds_since(started: float, job: Job) -> float:
    """Until all is done that the device was given."""
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def model_seconds(job: Job) -> float:
    """Of the bare forward pass up to the last layer over all contexts."""
    started = time.perf_counter()
    for part in job.contexts.split(MODEL_CONTEXTS):
        capture_all(job.lm, job.hooks, part)
    return seconds_since(started, job)


def sae_seconds(job: Job) -> float:
    """Of training on as many rows that are in memory, layer by layer."""
    total = 0.0
    for held_out in job.held_out:
        rows, trainer = held_out.rows, Trainer(job.config, device=job.device)
        trainer.initialise(rows)
        started = time.perf_counter()
        for _ in range(job.tokens // BATCH):
            trainer.step(rows[torch.randint(len(rows), (BATCH,))])
        total += seconds_since(started, job)
    return total


def scores(job: Job, saes: list[SAE]) -> Row:
    """Means over the layers."""
    reports = [
        evaluate(sae, job.lm, hook, held_out)
        for sae, hook, held_out in zip(saes, job.hooks, job.held_out, strict=True)
    ]
    ce = mean(one["cross_entropy"]["trained_rows"]["ce_loss_score"] for one in reports)
    return {"fvu": round(mean(r["rows"]["fvu"] for r in reports), 4), "ce_loss_score": round(ce, 4)}


@dataclass
class Ran:
    """A method's turns."""

    clocks: list[Clock] = field(default_factory=list)
    saes: list[SAE] = field(default_factory=list)
    failed: str | None = None

    @property
    def seconds(self) -> float:
        return mean(clock.seconds for clock in self.clocks)


def run(job: Job, methods: list[str], turns: int) -> dict[str, Ran]:
    """Every method in turn, and in the other order every second time."""
    ran = {name: Ran() for name in methods}
    for turn in range(turns):
        for name in methods if turn % 2 == 0 else reversed(methods):
            mine, clock = ran[name], Clock()
            if mine.failed is not None:
                continue
            library = PROVIDERS.get(name.removesuffix("-flags"))
            if library is not None and (install := library.missing()):
                mine.failed = f"not installed: {install}"
                continue
            try:
                with quiet():
                    clock.start()
                    mine.saes = METHODS[name](job, clock)
                    clock.stop()
                mine.clocks.append(clock)
                print(f"{name}: {clock.seconds:.1f} s", flush=True)
            except Exception as failure:
                mine.failed = why(failure)
    return ran


def measure(job: Job, methods: list[str], turns: int = 1) -> list[Row]:
    where = f"layer{'s' * (len(job.layers) > 1)} {', '.join(map(str, job.layers))}"
    shared = {"bench": "end_to_end", "case": f"smollm2-135m {where}", "F": job.d_sae}
    shared |= {"K": job.k, "tokens": job.tokens}
    halves = {"model_seconds": model_seconds(job), "sae_seconds": sae_seconds(job)}
    ran = run(job, methods, turns)
    ours = ran.get("fastsae", Ran(failed="not asked for"))
    found: list[Row] = []
    for name, one in ran.items():
        found.append({**shared, "provider": name, **outcome(job, one, ours)})
        if one is ours and one.failed is None:
            found[-1] |= {key: round(value, 2) for key, value in halves.items()}
            found[-1]["fraction"] = round(max(halves.values()) / one.seconds, 3)
        print(found[-1], flush=True)
    return found


def outcome(job: Job, one: Ran, ours: Ran) -> Row:
    """Throughput and quality, beside ours."""
    if one.failed is not None:
        return {"failed": one.failed}
    row: Row = {"seconds": round(one.seconds, 2)}
    row["tokens_per_second"] = round(job.tokens / one.seconds, 1)
    row |= scores(job, one.saes)
    if ours.failed is None:
        row["over_fastsae"] = round(one.seconds / ours.seconds, 3)
        if one is not ours:
            reached = seconds_to(ours.clocks[0].curve, mean_fvu(job, one.saes))
            row["to_its_fvu"] = None if reached is None else round(reached, 2)
    return row


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, nargs="+", default=[9])
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=4096, help="tokens")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args(arguments)
    job = prepare(args.layers, args.tokens, args.d_sae, args.k, args.held_out, args.device)
    found = measure(job, args.methods or default_methods(args.device), args.turns)
    if args.save:
        print(f"appended to {append(args.save, found, args.device)}")
    return found


if __name__ == "__main__":
    main()
