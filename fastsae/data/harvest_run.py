"""Activations of a language model, written to a folder that outlives the run and any kill."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from fastsae.checks import check_counts
from fastsae.data.hooks import HookPoint, d_at, resid_hook_name, resolve_hook
from fastsae.data.language_model import LanguageModel, load_language_model
from fastsae.data.model_rows import (
    BadRow,
    KeptRows,
    ModelRows,
    NonFinite,
    RowRules,
    default_batch_contexts,
    token_batches,
)
from fastsae.data.prefetch import Prefetched
from fastsae.data.shard_buffer import ShardBuffer, ShardRows
from fastsae.data.shards import INDEX, Index, Shard, check_shard, read_index
from fastsae.data.smollm2 import file_sha256
from fastsae.data.text import Text, load_text, split_documents
from fastsae.data.tokens import token_contexts
from fastsae.device import resolve_device
from fastsae.files import replacing

_log = logging.getLogger(__name__)

HELD_OUT = "held-out"
"""Folder, within that of the training rows, of rows from documents that are held out."""
_TOKEN_BATCHES_AHEAD = 4

Progress = Callable[[str, int, int], None]
"""Called with the stage, the tokens done, and those there are: 0 if nobody knows."""


@dataclass(frozen=True, kw_only=True)
class HarvestRun:
    """Write the activations of a language model to a folder, to train from without the model.

    The same command goes on where a killed one stopped, or before a shard that is lost or damaged,
    and ends with the same bytes.
    """

    out: Path
    """Folder for the index and the shards; rows of held-out documents go to `held-out` in it."""
    model: str | None = None
    """Hub name, local folder or .gguf file; None: SmolLM2-135M-Instruct, offline."""
    revision: str = "main"
    """Branch, tag or commit of a model on a hub."""
    hooks: tuple[str, ...] = ()
    """Places such as `blocks.8.hook_resid_post`, or modules' paths, all from one pass of the model;
    none: the residual stream after the middle layer."""
    dataset: str | None = None
    """Hub name or local text, jsonl, parquet, csv or arrow; None: Wikipedia articles, offline."""
    text_column: str | None = None
    """Column with the documents, or with their tokens."""
    split: str = "train"
    """Split of a hub dataset. A tenth of any text, whole documents drawn at random, is held out."""
    context_size: int = 128
    """Tokens a context."""
    tokens: int | None = 1_000_000
    """Tokens the model runs over, or all of the text if that has fewer; None: all of the text."""
    eval_tokens: int = 16_384
    """The same of held-out documents; 0: none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the rows on disk; auto: the model's own. A row that float16 does not hold is an error."""
    drop_special: bool = True
    """Leave out the rows of the tokenizer's special tokens, wherever they stand."""
    skip_first: int = 1
    """Positions at the start of each context that are left out."""
    massive_multiple: float | None = 10.0
    """Rows with a norm above this multiple of the median, at any hook, are left out; None: kept."""
    nonfinite: NonFinite = "stop"
    """What NaN or inf in an activation means: an error, or a row left out."""
    shard_mib: int = 256
    """Size of a shard, at most."""
    batch_contexts: int | None = None
    """Contexts of one pass; None: by device."""
    seed: int = 0
    """Decides which documents are held out."""
    device: str = "auto"

    def __post_init__(self) -> None:
        check_counts(self, "context_size", least=2)
        check_counts(self, "shard_mib")
        check_counts(self, "eval_tokens", least=0)
        check_counts(self, "tokens", "batch_contexts", optional=True)
        if not 0 <= self.skip_first < self.context_size:
            raise ValueError(
                f"skip_first must be from 0 to context_size - 1 = {self.context_size - 1}, "
                f"got {self.skip_first}"
            )
        if len(set(self.hooks)) != len(self.hooks):
            raise ValueError(f"hooks must be different places, got {list(self.hooks)}")


def harvest_to_disk(
    run: HarvestRun, progress: Progress | None = None, *, lm: LanguageModel | None = None
) -> Index:
    """Harvest into `run.out`, or go on with the harvest that is there.

    Shards are cut by contexts and passes by shards, so that a harvest that was killed, at any
    moment, is completed to the bytes of one that was not. The shards that are there are compared
    with the index; from the first on that is lost or damaged they are made again.

    Args:
        lm: a model that is loaded already (a TransformerLens bridge, say), for `run.model`.

    Returns:
        The index of the training rows.

    Raises:
        ValueError: `out` holds another harvest (the fields are named); no text, or no such column,
            hook or context; NaN, inf, or a number that the dtype does not hold (the shard and the
            row are named).
        OSError: `out` cannot be written to, or the disk has no room for the rows.
        ImportError: the `train` extra is absent.
    """
    _check_writable(run.out)
    tell = progress or (lambda *_: None)
    if lm is None:
        device = resolve_device(run.device)
        lm = load_language_model(run.model, device=device, revision=run.revision)
    if run.context_size > lm.context_size:
        raise ValueError(
            f"context_size must be at most {lm.context_size}, the most that {lm.name} reads, "
            f"got {run.context_size}"
        )
    names = run.hooks or (resid_hook_name(lm.n_layers // 2),)
    hooks = [resolve_hook(lm, name) for name in names]
    text = load_text(run.dataset, split=run.split, text_column=run.text_column)
    train, held_out = split_documents(text, seed=run.seed)
    parts = [_Part(run, lm, hooks, train, run.out, run.tokens, "train")]
    if run.eval_tokens:
        parts.insert(
            0,
            _Part(run, lm, hooks, held_out, run.out / HELD_OUT, run.eval_tokens, HELD_OUT),
        )
    for part in parts:
        part.cut_to_sound(tell)
    _check_room(run.out, sum(part.most_bytes_left() or 0 for part in parts))
    for part in parts:
        part.harvest(tell)
    return parts[-1].index


class _Part:
    """One folder of a harvest: its index, and the shards that are still to be made."""

    def __init__(
        self,
        run: HarvestRun,
        lm: LanguageModel,
        hooks: list[HookPoint],
        text: Text,
        folder: Path,
        tokens: int | None,
        name: str,
    ) -> None:
        self.lm, self.hooks, self.text, self.folder, self.name = lm, hooks, text, folder, name
        self.length = run.context_size
        self.n_contexts = None if tokens is None else math.ceil(tokens / run.context_size)
        self.dtype = lm.model.dtype if run.dtype == "auto" else getattr(torch, run.dtype)
        self.widths = {hook.name: d_at(lm, hook) for hook in hooks}
        special = lm.special_ids if run.drop_special else ()
        self.rules = RowRules(run.skip_first, special, run.massive_multiple, run.nonfinite)
        step = run.batch_contexts or default_batch_contexts(lm.device, run.context_size)
        row_bytes = sum(self.widths.values()) * self.dtype.itemsize
        passes = (run.shard_mib << 20) // (row_bytes * step * run.context_size)
        self.step, self.shard_contexts = step, step * max(1, passes)
        self.context_bytes = run.context_size * (row_bytes + 12)
        self.index = self._begun(self._source(run, tokens))

    def _source(self, run: HarvestRun, tokens: int | None) -> dict[str, Any]:
        settings = asdict(run)
        for name in ("out", "device", "hooks", "model", "revision", "batch_contexts", "shard_mib"):
            del settings[name]
        return {
            "model": self.lm.name,
            "revision": self.lm.revision,
            "weights": _fingerprint(self.lm),
            "model_dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "tokenizer": str(self.lm.tokenizer.name_or_path),
            **settings,
            "part": self.name,
            "tokens": tokens,
            "dropped_tokens": list(self.rules.dropped_tokens),
            "batch_contexts": self.step,
            "shard_contexts": self.shard_contexts,
            "device": self.lm.device.type,
        }

    def _begun(self, source: dict[str, Any]) -> Index:
        """The index in the folder, if it is of the same harvest; else an empty one."""
        dtype = str(self.dtype).removeprefix("torch.")
        if not (self.folder / INDEX).exists():
            return Index(source, dtype, self.widths, {}, {})
        index = read_index(self.folder)
        ours = {**source, "hooks": list(self.widths), "row dtype": dtype}
        theirs = {**index.source, "hooks": list(index.widths), "row dtype": index.dtype}
        changed = [k for k in (*ours, *(theirs.keys() - ours)) if ours.get(k) != theirs.get(k)]
        if changed:
            listing = "; ".join(
                f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} asked for" for k in changed
            )
            raise ValueError(
                f"out must be a new folder, or one of the same harvest, got {self.folder} of "
                f"another: {listing}"
            )
        return index

    def cut_to_sound(self, tell: Progress) -> None:
        """Drop the shards from the first on whose file is not what the index says."""
        shards, done = self.index.shards, 0
        for number, shard in enumerate(shards):
            try:
                check_shard(self.folder, shard)
            except (FileNotFoundError, ValueError) as error:
                _log.warning("%s: shards from %s on are made again", error, shard.file)
                self.index = replace(self.index, shards=shards[:number], complete=False)
                self.index.write(self.folder)
                for dropped in shards[number:]:  # they would take the room of the new ones
                    (self.folder / dropped.file).unlink(missing_ok=True)
                return
            done += shard.contexts * self.length
            tell(f"verify {self.name}", done, self.index.contexts * self.length)

    def most_bytes_left(self) -> int | None:
        """Bytes of the shards to come; None: nobody knows how long the text is."""
        if self.n_contexts is None:
            return None
        left = 0 if self.index.complete else self.n_contexts - self.index.contexts
        return left * self.context_bytes

    def harvest(self, tell: Progress) -> None:
        total = (self.n_contexts or 0) * self.length
        if self.index.complete:
            tell(self.name, self.index.contexts * self.length, total)
            return
        for pattern in (".shard-*", f".{INDEX}.*"):
            for left_by_a_kill in self.folder.glob(pattern):
                shutil.rmtree(left_by_a_kill)
        medians = list(self.index.median_norms.values()) or None
        passes = ModelRows(self.lm, self.hooks, self.rules, dtype=self.dtype, median_norms=medians)
        with ThreadPoolExecutor(1) as writer, self._batches() as batches:
            written: Future[None] | None = None
            for rows in self._shards(passes(batches), passes, tell, total):
                if written is not None:
                    written.result()
                written = writer.submit(self._write, rows, passes)
            if written is not None:
                written.result()
        if not self.index.rows:
            raise ValueError(
                f"text must leave rows to keep, got none of {self.index.contexts} contexts of "
                f"{self.text.name}: all are first, special or massive"
            )
        if self.n_contexts is not None and self.index.contexts < self.n_contexts:
            _log.warning(
                "%s: the text holds %d tokens of the %d asked for",
                self.name,
                self.index.contexts * self.length,
                total,
            )
        self.index = replace(self.index, complete=True)
        self.index.write(self.folder)

    def _batches(self) -> Prefetched[Any]:
        """Tokens of the contexts to come, made ahead of the model's passes."""
        contexts = token_contexts(
            self.text, self.lm.tokenizer, context_size=self.length, start=self.index.end
        )
        left = None if self.n_contexts is None else self.n_contexts - self.index.contexts
        batches = token_batches(islice(contexts, left), self.step)
        return Prefetched(batches, _TOKEN_BATCHES_AHEAD)

    def _shards(
        self, kept: Iterator[KeptRows], passes: ModelRows, tell: Progress, total: int
    ) -> Iterator[ShardRows]:
        """The rows of one shard after another.

        Two buffers take turns: one is filled while the other is written.
        """
        done = begun = self.index.contexts
        before = len(self.index.shards)
        room = self.shard_contexts * (self.length - self.rules.skip_first)
        if self.n_contexts is not None:
            most = (self.n_contexts - done) * (self.length - self.rules.skip_first)
            room = min(room, most)
        buffers = [ShardBuffer(self.widths, self.dtype, room) for _ in range(2)]
        rows_before = 0
        shard = ShardRows(buffers[0], before)
        try:
            for part in kept:
                shard.add(part)
                done += len(part.tokens)
                tell(self.name, done * self.length, total)
                if shard.contexts == self.shard_contexts:
                    rows_before += shard.n
                    yield shard
                    number = shard.number + 1
                    shard = ShardRows(buffers[(number - before) % 2], number)
        except BadRow as bad:
            raise ValueError(
                f"{bad.message} in shard {shard.number} at row {bad.row - rows_before}, context "
                f"{begun + bad.context} of the text at position {bad.position}"
            ) from bad
        if shard.contexts:
            yield shard

    def _write(self, rows: ShardRows, passes: ModelRows) -> None:
        name = f"shard-{rows.number:05}.safetensors"
        path = self.folder / name
        with replacing(path) as temporary:
            save_file(rows.tensors(), temporary)
            digest, n_bytes = file_sha256(temporary), temporary.stat().st_size
        assert passes.median_norms is not None
        shard = Shard(name, rows.n, rows.contexts, n_bytes, digest, rows.left_out, rows.end)
        limits = [None if math.isinf(limit) else limit for limit in passes.norm_limits]
        self.index = replace(
            self.index,
            median_norms=dict(zip(self.widths, passes.median_norms, strict=True)),
            norm_limits=dict(zip(self.widths, limits, strict=True)),
            shards=(*self.index.shards, shard),
        )
        self.index.write(self.folder)


def _fingerprint(lm: LanguageModel) -> str:
    """Digest of a sample of every parameter: other weights under the same name are noticed."""
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 16)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"out must be a folder that can be written to, got {folder}: {error}"
        ) from error


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"out must have room for the rows, {n_bytes / 1e9:.3g} GB, got {free / 1e9:.3g} GB "
            "free; use fewer tokens or hooks, or dtype bfloat16",
            str(folder),
        )
