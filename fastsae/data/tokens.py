"""Tokens of documents, packed into contexts one after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastsae.data.text import Document, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

_BLOCK_DOCUMENTS, _BLOCK_LENGTH = 64, 1 << 18
"""Documents, or characters of them, handed to the tokenizer at once: enough to keep its threads
busy, and little more than the first contexts need."""


class Place(NamedTuple):
    """How far a text was read: so many whole documents, and so many tokens of the next."""

    document: int = 0
    token: int = 0


BEGINNING = Place()


class Context(NamedTuple):
    tokens: Int[np.ndarray, " L"]
    end: Place
    """Where the next one begins."""


def tokenize(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_size: int = 128,
    prepend_bos: bool | None = None,
    n_tokens: int | None = None,
) -> Int[Tensor, "n L"]:
    """Contexts of the text, as `token_contexts` cuts them, held in memory.

    Args:
        n_tokens: stop at the first contexts that hold so many tokens, reading no more documents
            than they need; None: all of the text.

    Raises:
        ValueError: the text does not fill one context, or the tokenizer has no bos.
    """
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1 or None, got {n_tokens}")
    most = None if n_tokens is None else math.ceil(n_tokens / context_size)
    found = token_contexts(text, tokenizer, context_size=context_size, prepend_bos=prepend_bos)
    return torch.from_numpy(np.stack([context.tokens for context in islice(found, most)]))


def token_contexts(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_size: int = 128,
    prepend_bos: bool | None = None,
    start: Place = BEGINNING,
) -> Iterator[Context]:
    """Tokens of the documents in one stream, cut into full contexts of L = `context_size`.

    Each document is followed by one separator: `<|endoftext|>` if the vocabulary has it, else
    the tokenizer's eos, else its bos, else nothing. The tokenizer's own special tokens are not
    added. Documents that are tokens already are taken as they are. The last, incomplete context is
    dropped.

    Args:
        prepend_bos: put the tokenizer's bos in front of every context, which then holds
            `context_size - 1` tokens of text; None means if there is a bos and the documents are
            text. It costs no row, since the first position is not trained on, and the rest is
            predicted a little better: SmolLM2's loss on the articles is 3.32 nats with and 3.34
            without.
        start: the end of an earlier context, to go on from there.

    Raises:
        ValueError: the text does not fill one context, or the tokenizer has no bos.
    """
    front = _front(text, tokenizer, prepend_bos)
    if context_size < 1 + len(front):
        raise ValueError(f"context_size must be at least {1 + len(front)}, got {context_size}")
    return _packed(text, tokenizer, context_size - len(front), front, start)


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that goes after each document."""
    vocabulary = tokenizer.get_vocab()
    for token in ("<|endoftext|>", tokenizer.eos_token, tokenizer.bos_token):
        if token in vocabulary:
            return vocabulary[token]
    return None


def _front(
    text: Text, tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None
) -> Int[np.ndarray, " n"]:
    """What every context begins with: bos, or nothing."""
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos must be False for a tokenizer without a bos token, got True")
    if prepend_bos is None:
        prepend_bos = bos is not None and isinstance(next(iter(text.documents), ""), str)
    return np.array([bos] if prepend_bos else [], dtype=np.int64)


def _packed(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    width: int,
    front: Int[np.ndarray, " n"],
    start: Place,
) -> Iterator[Context]:
    left = np.empty(0, dtype=np.int64)
    skipped, n_contexts = start.token, 0
    documents = islice(text.documents, start.document, None)
    for document, ids in enumerate(_token_ids(documents, tokenizer), start.document):
        left = np.concatenate([left, np.array(ids[skipped:], dtype=np.int64)])
        skipped = 0
        n_whole = len(left) // width
        for part in left[: n_whole * width].reshape(n_whole, width):
            left = left[width:]
            n_contexts += 1
            end = Place(document, len(ids) - len(left)) if len(left) else Place(document + 1)
            yield Context(np.concatenate([front, part]), end)
    if n_contexts == 0 and start == BEGINNING:
        raise ValueError(
            f"text must fill one context of {width} tokens, got {len(left)} in {text.name}; "
            "use more text or a smaller context_size"
        )


def _token_ids(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Tokens of each document and the separator after it."""
    separator = separator_id(tokenizer)
    end = [] if separator is None else [separator]
    for block in _blocks(documents):
        if not isinstance(block[0], str):
            yield from cast(list[list[int]], block)
            continue
        encoded: Any = tokenizer(
            cast(list[str], block),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        yield from (ids + end for ids in encoded["input_ids"])


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block, length = list[Document](), 0
    for document in documents:
        block.append(document)
        length += len(document)
        if len(block) == _BLOCK_DOCUMENTS or length >= _BLOCK_LENGTH:
            yield block
            block, length = [], 0
    if block:
        yield block
