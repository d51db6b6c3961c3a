"""The whole job, language model included: text to a saved SAE, ours and the peers'.

    python -m bench.end_to_end                        # 60,000 tokens, layer 9 of SmolLM2-135M
    python -m bench.end_to_end --tokens 1000000 --methods fastsae sae-lens

Every method gets the same contexts of the same articles, one pass over them, one SAE. Seconds run
from the loaded model to the trained SAE in memory. The saved SAE is then evaluated by our
evaluation on held-out articles. `fraction` is the throughput of the whole run over that of its
slower half, the model's bare forward pass up to the layer or training on rows in memory.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.providers.base import quiet
from bench.record import append
from fastsae import SAE, TopKConfig, TrainConfig, Trainer
from fastsae.data import (
    Activations,
    HookPoint,
    LanguageModel,
    capture,
    harvest,
    load_language_model,
    load_text,
    resid_hook_name,
    resolve_hook,
    split_documents,
    tokenize,
)
from fastsae.data.batches import ShuffledRows
from fastsae.evaluation.evaluate import evaluate
from fastsae.interop.formats import load_sae

CONTEXT, BATCH = 128, 2048
MODEL_CONTEXTS = 16
"""Contexts of one forward pass."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every method is given."""

    lm: LanguageModel
    hook: HookPoint
    layer: int
    contexts: Tensor
    """[N, CONTEXT] token ids."""
    held_out: Activations
    d_sae: int
    k: int

    @property
    def tokens(self) -> int:
        return self.contexts.numel()


def prepare(layer: int, tokens: int, d_sae: int, k: int, held_out: int) -> Job:
    lm = load_language_model()
    hook = resolve_hook(lm, resid_hook_name(layer))
    train, rest = split_documents(load_text())
    cut = partial(tokenize, tokenizer=lm.tokenizer, context_size=CONTEXT)
    n_tokens = -(-tokens // BATCH) * BATCH  # whole batches for everybody
    contexts = cut(train, n_tokens=n_tokens)[: n_tokens // CONTEXT]
    unseen = harvest(lm, hook, cut(rest, n_tokens=held_out))
    return Job(lm, hook, layer, contexts, unseen, d_sae, k)


def run_fastsae(job: Job) -> SAE:
    """Harvest once, then train on the rows shuffled."""
    rows = harvest(job.lm, job.hook, job.contexts).rows
    cfg = TopKConfig(d_in=rows.shape[1], d_sae=job.d_sae, k=job.k)
    trainer = Trainer(TrainConfig(sae=cfg, total_tokens=job.tokens, batch_size=BATCH))
    return trainer.fit(ShuffledRows(rows, BATCH).from_step(0), sample=rows)


def run_sae_lens(job: Job) -> SAE:
    """Its runner on a TransformerBridge, reading the same contexts pretokenised."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from transformer_lens.model_bridge import TransformerBridge

    own = load_language_model()  # a bridge takes its model apart
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
            hook_name=f"blocks.{job.layer}.hook_resid_post",
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
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
            n_eval_batches=1,
            output_path=folder,
            checkpoint_path=None,
            verbose=False,
        )
        dataset = Dataset.from_dict({"input_ids": job.contexts.tolist()})
        runner = LanguageModelSAETrainingRunner(
            cfg, override_dataset=dataset, override_model=bridge
        )
        runner.run()
        return SAE.load_from_disk(folder)


def run_sparsify(job: Job) -> SAE:
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    dataset = Dataset.from_dict({"input_ids": job.contexts.tolist()}).with_format("torch")
    hookpoint = f"layers.{job.layer}"
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=job.d_sae, k=job.k),
            batch_size=BATCH // CONTEXT,
            optimizer="adam",
            lr_warmup_steps=10,
            hookpoints=[hookpoint],
            log_to_wandb=False,
            save_dir=folder,
            run_name="run",
        )
        trainer = Trainer(cfg, dataset, load_language_model().model)
        trainer.fit()
        trainer.saes[hookpoint].save_to_disk(folder)
        return load_sae(folder)


METHODS: dict[str, Callable[[Job], SAE]] = {
    "fastsae": run_fastsae,
    "sae-lens": run_sae_lens,
    "sparsify": run_sparsify,
}


@torch.no_grad()
def model_seconds(job: Job) -> float:
    """Of the bare forward pass up to the layer over all contexts."""
    started = time.perf_counter()
    for part in job.contexts.split(MODEL_CONTEXTS):
        capture(job.lm, job.hook, part)
    return time.perf_counter() - started


def sae_seconds(job: Job) -> float:
    """Of training on as many rows that are in memory."""
    rows = job.held_out.rows
    cfg = TopKConfig(d_in=rows.shape[1], d_sae=job.d_sae, k=job.k)
    trainer = Trainer(TrainConfig(sae=cfg, total_tokens=job.tokens, batch_size=BATCH))
    trainer.initialise(rows)
    started = time.perf_counter()
    for _ in range(job.tokens // BATCH):
        trainer.step(rows[torch.randint(len(rows), (BATCH,))])
    return time.perf_counter() - started


def measure(job: Job, methods: list[str]) -> list[Row]:
    shared = {"bench": "end_to_end", "case": f"smollm2-135m layer {job.layer}", "F": job.d_sae}
    shared |= {"K": job.k, "tokens": job.tokens}
    found: list[Row] = []
    halves = {"model_seconds": model_seconds(job), "sae_seconds": sae_seconds(job)}
    for name in methods:
        row: Row = {**shared, "provider": name}
        started = time.perf_counter()
        try:
            with quiet():
                sae = METHODS[name](job)
        except ImportError as failure:
            found.append(row | {"failed": f"not installed: {failure}"})
            continue
        seconds = time.perf_counter() - started
        report = evaluate(sae, job.lm, job.hook, job.held_out)
        row |= {"seconds": round(seconds, 2), "tokens_per_second": round(job.tokens / seconds, 1)}
        loss = report["cross_entropy"]["trained_rows"]
        row["fvu"] = round(report["rows"]["fvu"], 4)
        row["ce_loss_score"] = round(loss["ce_loss_score"], 4)
        row["over_fastsae"] = round(seconds / found[0]["seconds"], 3) if found else 1.0
        if name == "fastsae":
            row |= {key: round(value, 2) for key, value in halves.items()}
            row["fraction"] = round(max(halves.values()) / seconds, 3)
        found.append(row)
        print(row, flush=True)
    return found


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=8192, help="tokens")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args(arguments)
    job = prepare(args.layer, args.tokens, args.d_sae, args.k, args.held_out)
    found = measure(job, args.methods)
    if args.save:
        print(f"appended to {append(args.save, found)}")
    return found


if __name__ == "__main__":
    main()
