"""Where a run's rows come from: a language model, before the training or beside it, or a folder.

A source is one process's: `part` of `parts` that share each batch, in the order of their ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data import (
    Activations,
    HookPoint,
    LanguageModel,
    d_at,
    harvest_all,
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
from fastsae.data.streaming import PASSES_AHEAD, StreamedRows
from fastsae.data.text import Text
from fastsae.evaluation.evaluate import evaluate_on_rows, evaluate_several
from fastsae.saes import SAE
from fastsae.training.run_config import LanguageModelRun, Progress

SAMPLE_ROWS = 65_536
"""Rows that a run is initialised from."""
STREAM_SAMPLE_TOKENS = 8192
"""The same where the model runs beside the training: as many as decide the median norm."""


class ModelSource:
    """Rows of a model that is run over text now; they stay in memory."""

    halved = {"activations": "harvest_tokens halved"}
    """For an item of `held_bytes`, the setting that halves it."""

    def __init__(
        self, run: LanguageModelRun, lm: LanguageModel, part: int = 0, parts: int = 1
    ) -> None:
        self.run, self.lm, self.part, self.parts = run, lm, part, parts
        self._hooks: dict[str, HookPoint] = {}
        self._rows: dict[str, Activations] = {}
        self._held_out: dict[str, Activations] = {}

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
            **({} if self.lm.revision is None else {"model_revision": self.lm.revision}),
            **({} if run.nonfinite == "stop" else {"nonfinite": run.nonfinite}),
            "hook_name": hook,
            "context_size": run.context_size,
            "dataset_path": run.dataset,
            "dataset_split": run.split,
            "text_column": run.text_column,
            "held_out_seed": run.seed,
            "skip_first": RowRules.skip_first,
            "drop_special": run.drop_special,
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
        train, held_out = self._text()
        places = sorted(hooks)
        # Every process runs the model over its own contexts; the first evaluates.
        mine = slice(self.part, None, self.parts)
        self._rows = self._harvest(places, train, self.first_tokens, mine, tell, "harvest")
        if self.part == 0:
            self._held_out = self._harvest(
                places, held_out, self.run.eval_tokens, slice(None), tell, "harvest held-out"
            )

    def _text(self) -> tuple[Text, Text]:
        """To train on, and held out."""
        run = self.run
        text = load_text(run.dataset, split=run.split, text_column=run.text_column)
        return split_documents(text, seed=run.seed)

    def _harvest(
        self,
        places: list[str],
        text: Text,
        n_tokens: int,
        contexts: slice,
        tell: Progress,
        name: str,
    ) -> dict[str, Activations]:
        run = self.run
        tokens = tokenize(text, self.lm.tokenizer, context_size=run.context_size, n_tokens=n_tokens)
        found = harvest_all(
            self.lm,
            [self._hooks[place] for place in places],
            tokens[contexts],
            drop_special=run.drop_special,
            massive_multiple=run.massive_multiple,
            nonfinite=run.nonfinite,
            progress=lambda done, total: tell(name, done, total, {}),
        )
        return dict(zip(places, found, strict=True))

    def sample(self, hook: str) -> Tensor:
        """Rows to initialise from."""
        rows = self._rows[hook].rows
        return rows[:: max(1, len(rows) // SAMPLE_ROWS)]

    def batches(
        self, hooks: set[str], batch_size: int, steps: range
    ) -> Generator[dict[str, Float[Tensor, "B D"]]]:
        """By hook, those of so many steps, counted from 0: this process's part of each."""
        size, seed = batch_size // self.parts, self.run.seed
        rows = {hook: ShuffledRows(self._rows[hook].rows, size, seed) for hook in hooks}
        return _side_by_side(rows, steps)

    def evaluate(
        self, hook: str, saes: Mapping[str, SAE], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        """A report of each SAE on rows that were held out."""
        return evaluate_several(
            saes, self.lm, self._hooks[hook], self._held_out[hook], progress=progress
        )

    def held_out(self, hook: str) -> Activations | None:
        """Rows that were held out and their tokens, where there are tokens to show."""
        return self._held_out[hook]


class StreamSource(ModelSource):
    """Rows of a model that runs beside the training; a buffer of them is in memory.

    Args:
        ahead: passes of the model that another thread makes ahead.
    """

    halved = {"buffer": "buffer_rows halved"}

    def __init__(
        self,
        run: LanguageModelRun,
        lm: LanguageModel,
        part: int = 0,
        parts: int = 1,
        ahead: int = PASSES_AHEAD,
    ) -> None:
        super().__init__(run, lm, part, parts)
        self.ahead = ahead

    @property
    def first_tokens(self) -> int:
        """As many as decide where a run starts and what is massive."""
        return min(self.run.tokens, STREAM_SAMPLE_TOKENS)

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        width = sum(self.width(hook) for hook in hooks)
        buffer = self.run.buffer_rows * width * self.lm.model.dtype.itemsize
        return {**super().held_bytes(hooks), "buffer": buffer}

    def batches(
        self, hooks: set[str], batch_size: int, steps: range
    ) -> Generator[dict[str, Tensor]]:
        run = self.run
        rows = StreamedRows(
            self.lm,
            [self._hooks[hook] for hook in sorted(hooks)],
            self._text()[0],
            batch_size // self.parts,
            run.seed,
            context_size=run.context_size,
            rules=RowRules(
                dropped_tokens=self.lm.special_ids if run.drop_special else (),
                massive_multiple=run.massive_multiple,
                nonfinite=run.nonfinite,
            ),
            median_norms={hook: self._rows[hook].median_norm for hook in hooks},
            buffer_rows=run.buffer_rows,
            mixing=run.mixing,
            ahead=self.ahead,
            part=self.part,
            parts=self.parts,
        )
        return _of_steps(rows.from_step(steps.start), steps)


class ShardSource:
    """Rows that `fastsae harvest` wrote; no language model is loaded.

    Raises:
        FileNotFoundError, ValueError: as `ActivationShards`.
    """

    halved: dict[str, str] = {}
    lm = None

    def __init__(self, run: LanguageModelRun, folder: Path, part: int = 0, parts: int = 1) -> None:
        self.run, self.shards, self.part, self.parts = run, ActivationShards(folder), part, parts
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
            **({} if source["revision"] is None else {"model_revision": source["revision"]}),
            **({} if source["nonfinite"] == "stop" else {"nonfinite": source["nonfinite"]}),
            "hook_name": hook,
            "context_size": source["context_size"],
            "dataset_path": source["dataset"],
            "dataset_split": source["split"],
            "text_column": source["text_column"],
            "held_out_seed": source["seed"],
            "skip_first": source["skip_first"],
            "drop_special": bool(source["dropped_tokens"]),
            "massive_multiple": source["massive_multiple"],
            "activations_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        }

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        return {}  # a few batches, out of mapped files

    def read(self, hooks: set[str], tell: Progress) -> None:
        """Compare checksums, of this process's share of the shards, once in a run."""
        if self.run.verify and not self.run.resume:
            self._verify(self.shards, tell, "verify")
            self._verify(self._held_out, tell, "verify held-out")

    def _verify(self, shards: ActivationShards, tell: Progress, name: str) -> None:
        mine = range(self.part, len(shards.index.shards), self.parts)
        shards.verify(mine, lambda done, total: tell(name, done, total, {}))

    def sample(self, hook: str) -> Tensor:
        return ShardedRows(self.shards, hook, 1).sample(SAMPLE_ROWS)

    def batches(
        self, hooks: set[str], batch_size: int, steps: range
    ) -> Generator[dict[str, Tensor]]:
        part = {"part": self.part, "parts": self.parts}
        rows = {
            hook: ShardedRows(self.shards, hook, batch_size, self.run.seed, **part)
            for hook in hooks
        }
        return _side_by_side(rows, steps)

    def evaluate(
        self, hook: str, saes: Mapping[str, SAE], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Any]]:
        rows = self._held_out.first_rows(hook, self.run.eval_tokens)
        report = {"model": self._held_out.index.source["model"], "hook": hook}
        found = evaluate_on_rows(saes, rows, progress=progress)
        return {name: {**report, **figures} for name, figures in found.items()}

    def held_out(self, hook: str) -> Activations | None:
        return None


def row_source(
    run: LanguageModelRun, device: torch.device, part: int, parts: int
) -> ModelSource | ShardSource:
    if run.activations is not None:
        return ShardSource(run, run.activations, part, parts)
    kind = StreamSource if run.stream else ModelSource
    lm = load_language_model(run.model, device=device, revision=run.revision)
    return kind(run, lm, part, parts)


def _side_by_side(
    rows: Mapping[str, ShuffledRows] | Mapping[str, ShardedRows], steps: range
) -> Generator[dict[str, Tensor]]:
    streams = {hook: one.from_step(steps.start) for hook, one in rows.items()}
    for _ in steps:
        yield {hook: next(stream) for hook, stream in streams.items()}


def _of_steps(batches: Generator[dict[str, Tensor]], steps: range) -> Generator[dict[str, Tensor]]:
    with closing(batches):
        for _ in steps:
            yield next(batches)
