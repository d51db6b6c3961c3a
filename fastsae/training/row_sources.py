"""Where a run's rows come from: a language model, before the training or beside it, or a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data import (
    Activations,
    HookPoint,
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
from fastsae.data.harvest_run import HELD_OUT
from fastsae.data.model_rows import RowRules
from fastsae.data.sharded_rows import ShardedRows
from fastsae.data.shards import ActivationShards
from fastsae.data.streaming import StreamedRows
from fastsae.distributed.mesh import Mesh
from fastsae.evaluation.evaluate import evaluate_on_rows, evaluate_several
from fastsae.saes import SAE

if TYPE_CHECKING:
    from fastsae.training.language_model_run import LanguageModelRun, Progress

SAMPLE_ROWS = 65_536
"""Rows that a run is initialised from."""
STREAM_SAMPLE_TOKENS = 8192
"""The same where the model runs beside the training: as many as decide the median norm."""
FROM_SHARDS = (
    *("model", "dataset", "text_column", "split", "context_size", "harvest_tokens"),
    *("massive_multiple", "stream", "buffer_rows", "mixing"),
)
"""Fields of a run that mean nothing where its rows come from a harvest."""


class ModelSource:
    """Rows of a model that is run over text now; they stay in memory."""

    halved = {"activations": "harvest_tokens halved"}
    """For an item of `held_bytes`, the setting that halves it."""

    def __init__(self, run: LanguageModelRun, device: torch.device, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        self.lm = load_language_model(run.model, device=device)
        self._hooks: dict[str, HookPoint] = {}
        self._found: dict[str, tuple[Activations, Activations]] = {}

    def place(self, run: LanguageModelRun) -> str:
        """Name of the hook that a run asks for."""
        layer = self.lm.n_layers // 2 if run.layer is None else run.layer
        hook = resolve_hook(self.lm, run.hook or resid_hook_name(layer))
        self._hooks[hook.name] = hook
        return hook.name

    def width(self, hook: str) -> int:
        """D of a hook's rows."""
        return d_at(self.lm, self._hooks[hook])

    def metadata(self, hook: str) -> dict[str, Any]:
        """What an SAE of these rows says about its origin."""
        run = self.run
        return {
            "model_name": self.lm.name,
            "hook_name": hook,
            "context_size": run.context_size,
            "dataset_path": run.dataset,
            "dataset_split": run.split,
            "text_column": run.text_column,
            "held_out_seed": run.seed,
            "massive_multiple": run.massive_multiple,
        }

    @property
    def first_tokens(self) -> int:
        """That the model runs over before the training, those that are held out aside."""
        return self.run.harvest_tokens or self.run.tokens

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        """Memory that stays for the whole run, by item."""
        rows = self.first_tokens + self.run.eval_tokens
        width = sum(self.width(hook) for hook in hooks)
        return {
            "language model": sum(p.nbytes for p in self.lm.model.parameters()),
            "activations": rows * width * self.lm.model.dtype.itemsize,
        }

    def read(self, hooks: set[str], tell: Progress) -> None:
        """Do what must be done before there are batches."""
        for hook in sorted(hooks):
            self._found[hook] = self._harvest(self._hooks[hook], tell)

    def _harvest(self, hook: HookPoint, tell: Progress) -> tuple[Activations, Activations]:
        """Rows to train on, and rows that are held out."""
        run = self.run
        text = load_text(run.dataset, split=run.split, text_column=run.text_column)
        budgets = (self.first_tokens, run.eval_tokens)
        tokens = [
            tokenize(part, self.lm.tokenizer, context_size=run.context_size, n_tokens=budget)
            for part, budget in zip(split_documents(text, seed=run.seed), budgets, strict=True)
        ]
        # Every process runs the model over its own contexts; one evaluates.
        tokens[0] = tokens[0][self.mesh.rank :: self.mesh.size]
        train, held_out = (
            harvest(
                self.lm,
                hook,
                part,
                massive_multiple=run.massive_multiple,
                progress=lambda done, total, name=name: tell(name, done, total, {}),
            )
            for part, name in zip(tokens, ("harvest", "harvest held-out"), strict=True)
        )
        return train, held_out

    def sample(self, hook: str) -> Tensor:
        """Rows to initialise from."""
        rows = self._found[hook][0].rows
        return rows[:: max(1, len(rows) // SAMPLE_ROWS)]

    def batches(
        self, hooks: set[str], batch_size: int, step: int
    ) -> Generator[dict[str, Float[Tensor, "B D"]]]:
        """By hook, from that of a step, counted from 0, on: this process's part of them."""
        size, seed = batch_size // self.mesh.size, self.run.seed
        rows = {hook: ShuffledRows(self._found[hook][0].rows, size, seed) for hook in hooks}
        return _side_by_side({hook: one.from_step(step) for hook, one in rows.items()})

    def evaluate(
        self, hook: str, saes: Mapping[str, SAE], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        """A report of each SAE on rows that were held out."""
        return evaluate_several(
            saes, self.lm, self._hooks[hook], self._found[hook][1], progress=progress
        )

    def held_out(self, hook: str) -> Activations | None:
        """Rows that were held out and their tokens, where there are tokens to show."""
        return self._found[hook][1]


class StreamSource(ModelSource):
    """Rows of a model that runs beside the training; a buffer of them is in memory."""

    halved = {"buffer": "buffer_rows halved"}

    @property
    def first_tokens(self) -> int:
        """As many as decide where a run starts and what is massive."""
        return min(self.run.tokens, STREAM_SAMPLE_TOKENS)

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        width = sum(self.width(hook) for hook in hooks)
        buffer = self.run.buffer_rows * width * self.lm.model.dtype.itemsize
        return {**super().held_bytes(hooks), "buffer": buffer}

    def batches(self, hooks: set[str], batch_size: int, step: int) -> Generator[dict[str, Tensor]]:
        run = self.run
        text = load_text(run.dataset, split=run.split, text_column=run.text_column)
        train, _ = split_documents(text, seed=run.seed)
        return StreamedRows(
            self.lm,
            [self._hooks[hook] for hook in sorted(hooks)],
            train,
            batch_size // self.mesh.size,
            run.seed,
            context_size=run.context_size,
            rules=RowRules(massive_multiple=run.massive_multiple),
            median_norms={hook: self._found[hook][0].median_norm for hook in hooks},
            buffer_rows=run.buffer_rows,
            mixing=run.mixing,
            part=self.mesh.rank,
            parts=self.mesh.size,
        ).from_step(step)


class ShardSource:
    """Rows that `fastsae harvest` wrote; no language model is loaded.

    Raises:
        FileNotFoundError, ValueError: as `ActivationShards`.
    """

    halved: dict[str, str] = {}
    lm = None

    def __init__(self, run: LanguageModelRun, folder: Path, mesh: Mesh) -> None:
        self.run, self.shards, self.mesh = run, ActivationShards(folder), mesh
        held_out = folder / HELD_OUT
        if not held_out.is_dir():
            raise ValueError(
                f"activations must hold rows of held-out documents to evaluate on, got {folder} "
                f"without {HELD_OUT}; harvest with eval_tokens"
            )
        self._held_out = ActivationShards(held_out)

    def place(self, run: LanguageModelRun) -> str:
        asked = run.hook or (None if run.layer is None else resid_hook_name(run.layer))
        if asked is None and len(self.shards.hooks) > 1:
            raise ValueError(
                f"hook must be one of those harvested into {self.shards.folder}, "
                f"{', '.join(self.shards.hooks)}, got None"
            )
        return self.shards.check_hook(asked or self.shards.hooks[0])

    def width(self, hook: str) -> int:
        return self.shards.index.widths[hook]

    def metadata(self, hook: str) -> dict[str, Any]:
        source = self.shards.index.source
        digests = "".join(shard.sha256 for shard in self.shards.index.shards)
        return {
            "model_name": source["model"],
            "hook_name": hook,
            "context_size": source["context_size"],
            "dataset_path": source["dataset"],
            "dataset_split": source["split"],
            "text_column": source["text_column"],
            "held_out_seed": source["seed"],
            "massive_multiple": source["massive_multiple"],
            "activations_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        }

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        return {}  # a few batches, out of mapped files

    def read(self, hooks: set[str], tell: Progress) -> None:
        """Nothing: batches come as they are read."""

    def sample(self, hook: str) -> Tensor:
        return ShardedRows(self.shards, hook, 1).sample(SAMPLE_ROWS)

    def batches(self, hooks: set[str], batch_size: int, step: int) -> Generator[dict[str, Tensor]]:
        part = {"part": self.mesh.rank, "parts": self.mesh.size}
        rows = {
            hook: ShardedRows(self.shards, hook, batch_size, self.run.seed, **part)
            for hook in hooks
        }
        return _side_by_side({hook: one.from_step(step) for hook, one in rows.items()})

    def evaluate(
        self, hook: str, saes: Mapping[str, SAE], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        index = self._held_out.index
        rows = torch.cat([self._held_out.rows(hook, i) for i in range(len(index.shards))])
        report = {"model": index.source["model"], "hook": hook}
        found = evaluate_on_rows(saes, rows[: self.run.eval_tokens], progress=progress)
        return {name: {**report, **figures} for name, figures in found.items()}

    def held_out(self, hook: str) -> Activations | None:
        return None


def row_source(
    run: LanguageModelRun, device: torch.device, mesh: Mesh
) -> ModelSource | ShardSource:
    if run.activations is not None:
        return ShardSource(run, run.activations, mesh)
    return StreamSource(run, device, mesh) if run.stream else ModelSource(run, device, mesh)


def _side_by_side(streams: Mapping[str, Iterator[Tensor]]) -> Generator[dict[str, Tensor]]:
    while True:
        yield {hook: next(stream) for hook, stream in streams.items()}
