"""What the way of the data costs: harvesting, reading back, and steps fed from a disk.

    python -m bench.pipeline                         # 8,192 tokens, layer 9 of SmolLM2-135M
    python -m bench.pipeline --tokens 1000000 --disk /fast/disk

`harvest` is measured against the model's bare forward pass up to the layer over the same contexts,
`read-back` (shuffled batches) against reading the same files in order by safetensors and by
`numpy.memmap`, and `step` (training on what is read back) against steps on rows in memory. `share`
is the throughput over the rival's. For `read-back` the files are copied until they hold a gigabyte,
and put out of the system's cache before each run.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from bench.measure import Run, interleaved, peak_mib, quantiles
from bench.record import append
from fastsae import DataConfig, TopKConfig, TrainConfig, Trainer
from fastsae.data import LanguageModel, capture, load_language_model, resid_hook_name, resolve_hook
from fastsae.data.harvest_run import HarvestRun, harvest_to_disk
from fastsae.data.model_rows import default_batch_contexts
from fastsae.data.sharded_rows import ShardedRows
from fastsae.data.shards import ActivationShards, Shard, read_index

BATCH = 2048
READ_BYTES = 1 << 30
STEPS = 8
Row = dict[str, Any]


def harvesting(run: HarvestRun, lm: LanguageModel) -> dict[str, Run]:
    """Each run harvests into a new folder; the last one stays."""
    hook = resolve_hook(lm, run.hooks[0])

    def ours() -> None:
        shutil.rmtree(run.out, ignore_errors=True)
        harvest_to_disk(run, lm=lm)

    ours()
    shards = ActivationShards(run.out)
    tokens = torch.cat([shards.where(i).tokens for i in range(len(shards.index.shards))]).long()
    passes = tokens.split(default_batch_contexts(lm.device, run.context_size))
    return {"fastsae": ours, "bare forward pass": lambda: [capture(lm, hook, p) for p in passes]}


def reading(folder: Path, hook: str) -> dict[str, Run]:
    """All batches of an epoch, each run from the disk."""

    def drain(batches: Callable[[ActivationShards], Iterator[Tensor]]) -> None:
        shards = ActivationShards(folder)  # of its own: what is mapped is not put out of the cache
        evict(shards)
        for _ in islice(batches(shards), shards.index.rows // BATCH):
            pass

    return {
        "fastsae": lambda: drain(lambda shards: ShardedRows(shards, hook, BATCH).from_step(0)),
        "safetensors": lambda: drain(lambda shards: by_safetensors(shards, hook)),
        "numpy.memmap": lambda: drain(lambda shards: by_memmap(shards, hook)),
    }


def copied(folder: Path, n_bytes: int) -> Path:
    """The harvest's shards again and again, in a folder of their own beside it."""
    larger, index = folder.with_name("larger"), read_index(folder)
    larger.mkdir()
    shards: list[Shard] = []
    while sum(shard.n_bytes for shard in shards) < n_bytes:
        for shard in index.shards:
            shards.append(replace(shard, file=f"shard-{len(shards):05}.safetensors"))
            shutil.copy(folder / shard.file, larger / shards[-1].file)
    replace(index, shards=tuple(shards)).write(larger)
    return larger


def evict(shards: ActivationShards) -> None:
    """Have the system forget what it holds of the files."""
    for i in range(len(shards.index.shards)):
        with shards.path(i).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_safetensors(shards: ActivationShards, hook: str) -> Iterator[Tensor]:
    """Batches in the order of the files, read into memory of their own."""
    for i in range(len(shards.index.shards)):
        with safe_open(shards.path(i), "pt") as file:
            for part in file.get_tensor(f"rows.{hook}").split(BATCH):
                yield part.clone()


def by_memmap(shards: ActivationShards, hook: str) -> Iterator[Tensor]:
    width, kind = shards.index.widths[hook], np.dtype(f"V{shards.dtype.itemsize}")
    for i, shard in enumerate(shards.index.shards):
        n_bytes = shard.rows * width * kind.itemsize
        offset = _offset(shards.path(i), f"rows.{hook}", n_bytes)
        rows = np.memmap(shards.path(i), np.uint8, "r", offset, (shard.rows, n_bytes // shard.rows))
        for first in range(0, len(rows), BATCH):
            yield torch.from_numpy(np.array(rows[first : first + BATCH]))


def _offset(path: Path, name: str, n_bytes: int) -> int:
    """Where the bytes of a tensor start: behind 8 bytes, the header and the tensors before it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
    assert end - start == n_bytes
    return 8 + length + start


def stepping(shards: ActivationShards, hook: str, d_sae: int) -> dict[str, Run]:
    """Steps of two trainers: on batches that are read, and on batches that are there."""
    cfg = TrainConfig(
        sae=TopKConfig(d_in=shards.index.widths[hook], d_sae=d_sae, k=32),
        data=DataConfig(total_tokens=10**9, batch_size=BATCH),
    )
    read = ShardedRows(shards, hook, BATCH).from_step(0)
    there = list(islice(ShardedRows(shards, hook, BATCH).from_step(0), STEPS))
    runs: dict[str, Run] = {}
    feeds: dict[str, Callable[[], Iterator[Tensor]]] = {
        "fastsae": lambda: islice(read, STEPS),
        "rows in memory": lambda: iter(there),
    }
    for name, feed in feeds.items():
        trainer = Trainer(cfg, device="cpu")
        trainer.initialise(there[0])
        runs[name] = lambda trainer=trainer, feed=feed: [trainer.step(x) for x in feed()]
    return runs


def measured(level: str, runs: dict[str, Run], repeats: int, amount: float, unit: str) -> list[Row]:
    """A row a run, ours first; `amount` of work in each, in the unit of `rate`."""
    seconds = interleaved(runs, repeats)
    times = {name: quantiles(s) for name, s in seconds.items()}
    found = []
    for name, run in runs.items():
        row: Row = {"bench": "pipeline", "level": level, "provider": name, **times[name]}
        row |= {"rate": round(1e3 * amount / times[name]["ms_p50"], 2), "unit": unit}
        row |= peak_mib(run)
        if name != "fastsae":
            row["share"] = round(times[name]["ms_p50"] / times["fastsae"]["ms_p50"], 3)
        found.append(row)
        print(row, flush=True)
    return found


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk", type=Path, help="folder below which rows are written for a while")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args(arguments)
    lm = load_language_model()
    hook = resid_hook_name(args.layer)
    with tempfile.TemporaryDirectory(dir=args.disk) as temporary:
        folder = Path(temporary) / "rows"
        run = HarvestRun(out=folder, hooks=(hook,), tokens=args.tokens, eval_tokens=0, shard_mib=16)
        found = measured("harvest", harvesting(run, lm), args.repeats, args.tokens, "tokens/s")
        larger = copied(folder, READ_BYTES)
        shards = ActivationShards(larger)
        n_rows = shards.index.rows // BATCH * BATCH
        gigabytes = n_rows * shards.index.widths[hook] * shards.dtype.itemsize / 1e9
        found += measured("read-back", reading(larger, hook), args.repeats, gigabytes, "GB/s")
        found += measured(
            "step", stepping(shards, hook, args.d_sae), args.repeats, STEPS, "steps/s"
        )
    for row in found:
        row |= {"case": f"smollm2-135m layer {args.layer}", "tokens": args.tokens}
    if args.save:
        print(f"appended to {append(args.save, found, 'cpu')}")
    return found


if __name__ == "__main__":
    main()
