"""Activations in a folder: shards of rows, and an index that says what they are.

`index.json` states the source (model, hooks, text, ..), the width of each hook's rows, their dtype,
and for every shard its file, rows, contexts, bytes and SHA-256. A shard is a safetensors file:

    rows.<hook>  [n, D]   kept rows, one tensor a hook; row i is the same token at every hook
    context      [n]      int32, the context of each row, within the shard
    position     [n]      int32, its position there
    tokens       [c, L]   int32, the tokens of the shard's contexts, all of them

A shard is in the index only once its file is complete, and the index is replaced in one rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.data.smollm2 import file_sha256
from fastsae.data.tokens import BEGINNING, Place
from fastsae.files import write_json

INDEX = "index.json"
FORMAT, VERSION = "fastsae-activations", 1
_MAPPED = 64
"""Shards that stay mapped; one that comes back is mapped again."""
_REPAIR = "the same `fastsae harvest`, given again, repairs it"


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    rows: int
    contexts: int
    n_bytes: int
    sha256: str
    left_out: dict[str, int]
    """Rows that are not there, by reason."""
    end: Place
    """How far the text was read."""


@dataclass(frozen=True)
class Index:
    """What a folder of activations holds."""

    source: dict[str, Any]
    """What decides every bit of the rows."""
    dtype: str
    widths: dict[str, int]
    """D of each hook."""
    median_norms: dict[str, float]
    """Of each hook's first rows, in the rows' own units."""
    norm_limits: dict[str, float | None]
    """Rows with a larger norm at any hook were left out; None: no limit."""
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def contexts(self) -> int:
        return sum(shard.contexts for shard in self.shards)

    @property
    def end(self) -> Place:
        """How far the text was read."""
        return self.shards[-1].end if self.shards else BEGINNING

    def write(self, folder: Path) -> None:
        write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, **asdict(self)})


def read_index(folder: Path) -> Index:
    """The index of a folder, complete or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another format or version.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"activations must be a folder with {INDEX}, as `fastsae harvest` writes it, "
            f"got {folder} without it"
        )
    try:
        found = json.loads(path.read_text())
        kind = found.pop("format"), found.pop("version")
        if kind != (FORMAT, VERSION):
            raise ValueError(
                f"{path} must be of the format {FORMAT}, version {VERSION}, got {kind}"
            )
        shards = [Shard(**{**shard, "end": Place(*shard["end"])}) for shard in found.pop("shards")]
        return Index(**found, shards=tuple(shards))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; harvest again into another folder"
        ) from error


def check_size(folder: Path, shard: Shard) -> None:
    """Raise where the file of a shard is absent, or not as long as the index says."""
    path = folder / shard.file
    if not path.is_file():
        raise FileNotFoundError(
            f"activations must hold every shard of {INDEX}, got no {shard.file} in {folder}; "
            f"{_REPAIR}"
        )
    if path.stat().st_size != shard.n_bytes:
        raise ValueError(
            f"shard must have {shard.n_bytes} bytes, got {path.stat().st_size} for {path}: "
            f"it is truncated or damaged; {_REPAIR}"
        )


def check_shard(folder: Path, shard: Shard) -> None:
    """The same, and where its file has another checksum."""
    check_size(folder, shard)
    found = file_sha256(folder / shard.file)
    if found != shard.sha256:
        raise ValueError(
            f"shard must have the SHA-256 of the index, {shard.sha256}, got {found} for "
            f"{folder / shard.file}: it is damaged; {_REPAIR}"
        )


class Where(NamedTuple):
    """Where the rows of a shard come from."""

    context: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    tokens: Int[Tensor, "c L"]


class ActivationShards:
    """A complete folder of activations, to read from.

    Args:
        folder: what `fastsae harvest` wrote.

    Raises:
        FileNotFoundError: no index, or a shard of the index is absent.
        ValueError: the harvest is not finished, or a shard is not as long as the index says.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if not self.index.complete:
            raise ValueError(
                f"activations must be harvested to the end, got {self.index.rows} rows in "
                f"{self.folder} so far; give the same `fastsae harvest` again to go on"
            )
        for shard in self.index.shards:
            check_size(self.folder, shard)
        self._map = lru_cache(_MAPPED)(self._open)

    @property
    def hooks(self) -> list[str]:
        return list(self.index.widths)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.index.dtype)

    def check_hook(self, hook: str) -> str:
        if hook not in self.index.widths:
            raise ValueError(
                f"hook must be one of those harvested into {self.folder}, {', '.join(self.hooks)}, "
                f"got {hook!r}"
            )
        return hook

    def rows(self, hook: str, shard: int) -> Float[Tensor, "n D"]:
        """The rows of one shard, mapped: read from the disk where and when they are touched."""
        return self._map(shard)[f"rows.{self.check_hook(hook)}"]

    def first_rows(self, hook: str, n_rows: int) -> Float[Tensor, "n D"]:
        """So many rows, or all if there are fewer, in memory; no further shard is read."""
        parts: list[Tensor] = []
        for shard in range(len(self.index.shards)):
            parts.append(self.rows(hook, shard)[:n_rows])
            n_rows -= len(parts[-1])
            if not n_rows:
                break
        return torch.cat(parts)

    def where(self, shard: int) -> Where:
        """Context, position and tokens of the rows of one shard."""
        found = self._map(shard)
        return Where(found["context"], found["position"], found["tokens"])

    def path(self, shard: int) -> Path:
        return self.folder / self.index.shards[shard].file

    def will_read(self, shards: Iterable[int]) -> None:
        """Have the system begin to read these, where it takes such advice; nobody waits for it."""
        if hasattr(os, "posix_fadvise"):
            for shard in shards:
                with self.path(shard).open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def verify(
        self,
        shards: Iterable[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read shards and compare their checksums with the index.

        Args:
            shards: which; None: all.
            progress: called with the rows that were read and those there are.

        Raises:
            FileNotFoundError, ValueError: a shard is not what the index says.
        """
        numbers = range(len(self.index.shards)) if shards is None else shards
        wanted = [self.index.shards[number] for number in numbers]
        total = sum(shard.rows for shard in wanted)
        done = 0
        for shard in wanted:
            check_shard(self.folder, shard)
            done += shard.rows
            if progress is not None:
                progress(done, total)

    def _open(self, shard: int) -> dict[str, Tensor]:
        path = self.path(shard)
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; {_REPAIR}") from error
