"""Contexts of tokens from a dataset, put together as SAELens puts them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fastsae.data import load_text
from fastsae.data.text import Document
from fastsae.extras import require

Separator = int | Literal["bos", "eos", "sep"] | None
TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
CHAT_COLUMNS = ("conversation", "conversations", "messages")
BLOCK_ROWS = 8


@dataclass(frozen=True)
class DocumentRows(Iterable[dict[str, Any]]):
    """Documents as rows of a dataset; a stream of them stays one."""

    documents: Iterable[Document]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"text" if isinstance(d, str) else "tokens": d} for d in self.documents)


def rows_of(dataset: Any, streaming: bool = True) -> Iterable[dict[str, Any]]:
    """Rows of a dataset: one that is loaded, a hub name, or a local file or folder.

    An empty name means the articles that `fastsae train` reads by default.
    """
    if not isinstance(dataset, str | Path):
        return dataset["train"] if isinstance(dataset, dict) else dataset
    datasets = require("datasets", extra="train")
    path = Path(dataset).expanduser()
    if str(dataset) and (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if str(dataset) and not path.exists() and "/" in str(dataset):
        try:
            return datasets.load_dataset(str(dataset), split="train", streaming=streaming)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"dataset must be one that can be read here, got {str(dataset)!r}: {error}; "
                "pass a dataset object or a local file"
            ) from error
    if path.suffix in (".jsonl", ".json", ".parquet", ".arrow"):
        kind = {".jsonl": "json", ".json": "json"}.get(path.suffix, path.suffix[1:])
        source = {"path": kind, "data_files": [str(path)], "split": "train", "streaming": True}
        return datasets.load_dataset(**source)
    return DocumentRows(load_text(str(dataset) or None).documents)


def sequences_of(
    rows: Iterable[dict[str, Any]], tokenizer: Any, chat: bool = False
) -> Iterator[list[int]]:
    """Token ids of each row: those it holds, or those of its text or conversation."""
    rows = iter(rows)
    while block := list(islice(rows, BLOCK_ROWS)):
        column = _column(block[0], chat)
        values = [row[column] for row in block]
        if chat:
            yield from (_chat_ids(tokenizer, value) for value in values)
        elif column in TOKEN_COLUMNS:
            yield from (_integers(value) for value in values)
        else:
            encoded = tokenizer(
                values, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            yield from encoded["input_ids"]


def contexts_in(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    context_size: int,
    *,
    prepend_bos: bool,
    separator: int | None,
    concatenate: bool,
    chat: bool,
) -> Iterator[list[int]]:
    """Contexts of `context_size` tokens; rows that hold tokens are contexts, cut to that size.

    Raises:
        ValueError: a row holds fewer tokens, or there is no tokenizer for its text.
    """
    sequences = sequences_of(rows, tokenizer, chat)
    if chat or not is_tokenized(next(iter(rows), {})):
        if tokenizer is None:
            raise ValueError("dataset must hold tokens for a model without a tokenizer, got text")
        bos = tokenizer.bos_token_id if prepend_bos else None
        yield from contexts_of(
            sequences, context_size, bos=bos, separator=separator, concatenate=concatenate
        )
        return
    for tokens in sequences:
        if len(tokens) < context_size:
            raise ValueError(
                f"dataset must hold contexts of at least context_size = {context_size} tokens, "
                f"got {len(tokens)}"
            )
        yield tokens[:context_size]


def contexts_of(
    sequences: Iterable[list[int]],
    context_size: int,
    *,
    bos: int | None = None,
    separator: int | None = None,
    concatenate: bool = True,
) -> Iterator[list[int]]:
    """Contexts of exactly `context_size` tokens.

    Concatenated, sequences follow each other with `separator` between them, cut where a context
    is full; each context begins with `bos`. Otherwise each sequence gives one context, its
    beginning, or none where it is too short. No token is doubled where it is there already.
    """
    if context_size < 1 + (bos is not None):
        raise ValueError(f"context_size must be at least {1 + (bos is not None)} with a bos token")
    if not concatenate:
        for tokens in sequences:
            if bos is not None and len(tokens) >= context_size - 1 and tokens[:1] != [bos]:
                tokens = [bos, *tokens[: context_size - 1]]
            if len(tokens) >= context_size:
                yield tokens[:context_size]
        return
    context: list[int] = []
    for tokens in sequences:
        at = 0
        while at < len(tokens):
            first = separator if context else bos
            if first is not None and tokens[at] != first:
                context.append(first)
            taken = tokens[at : at + context_size - len(context)]
            context += taken
            at += len(taken)
            if len(context) == context_size:
                yield context
                context = []


def special_id(token: Separator, tokenizer: Any) -> int | None:
    """The id of a special token that is named or given."""
    if token is None or isinstance(token, int):
        return token
    if token not in ("bos", "eos", "sep"):
        raise ValueError(
            f"sequence_separator_token must be 'bos', 'eos', 'sep', an id or None, got {token!r}"
        )
    return None if tokenizer is None else getattr(tokenizer, f"{token}_token_id")


def is_tokenized(row: dict[str, Any]) -> bool:
    return any(name in row for name in TOKEN_COLUMNS)


def _column(row: dict[str, Any], chat: bool) -> str:
    wanted = (*CHAT_COLUMNS, "text") if chat else (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    for name in wanted:
        if name in row:
            return name
    raise ValueError(f"dataset must have one of the columns {list(wanted)}, got {list(row)}")


def _integers(tokens: Any) -> list[int]:
    return tokens if isinstance(tokens, list) else tokens.tolist()


def _chat_ids(tokenizer: Any, turns: Any) -> list[int]:
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
