"""Text to run a language model on: packaged, local or from a hub; or tokens of it."""

from __future__ import annotations

import ast
import bz2
import importlib.util
import json
import logging
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastsae.data.language_model import cache_folder, publish
from fastsae.data.smollm2 import packaged_files
from fastsae.extras import require

_log = logging.getLogger(__name__)

Document = str | list[int]
"""Its text; or its tokens, of a dataset that holds those."""

_LOADERS = {
    ".txt": "txt",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}

HELD_BYTES = 64 << 20
"""Local files of more than so many bytes together are streamed, as everything from a hub is."""

PIECE = 1 << 20
"""Characters after which a text file that is streamed goes on as another document."""

_BESIDE_ARROW = ("dataset_dict.json", "dataset_info.json", "state.json")

_TOKEN_COLUMNS = ("input_ids", "tokens")
"""What a column of tokens is called, where there is no text."""


@dataclass(frozen=True)
class _Stream(Iterable[Document]):
    """Documents in the order of their source, opened again by every `iter`."""

    read: Callable[[], Iterable[Document]]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


@dataclass(frozen=True)
class Text:
    """Documents and where they come from."""

    name: str
    documents: Iterable[Document]
    """A sequence in memory, or a stream that is read anew each time it is gone over."""
    attribution: str
    """Authors and licence, to be kept with whatever quotes the documents."""


def load_text(
    dataset: str | Path | None = None,
    *,
    split: str = "train",
    text_column: str | None = None,
    limit: int | None = None,
) -> Text:
    """Load documents; empty ones are left out.

    The packaged documents and local files up to `HELD_BYTES` are held in memory. Larger files and
    datasets on the hub are streamed: a run reads no further than its tokens need.

    Args:
        dataset: None for 106 Wikipedia articles out of the installed gensim, or the docstrings
            of installed packages where gensim is absent; a .txt file, one document, or where it is
            streamed one after another of about `PIECE` characters; a .json, .jsonl, .parquet, .csv
            or .arrow file; a folder of files of one kind or one that `save_to_disk` of datasets
            made; else `name` or `name:config` on the hub.
        split: of a hub dataset.
        text_column: column with the documents, or with their tokens; None means `text`, or the
            only column of strings, or tokens in a column called `input_ids` or `tokens`.
        limit: at most so many documents, the first ones.

    Raises:
        FileNotFoundError: `dataset` is a path and nothing is there.
        ValueError: no such column, or no document in it.
        RuntimeError: the dataset cannot be read; of a stream, also while going over it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if dataset is None:
        text = _wikipedia() or _docstrings(limit)
    else:
        text = _from_dataset(str(dataset), split, text_column, limit)
    written = _Stream(lambda: islice(filter(_written, text.documents), limit))
    documents = list(written) if isinstance(text.documents, Sequence) else written
    if next(iter(documents), None) is None:
        raise ValueError(f"dataset must hold a document that is not empty, got none in {text.name}")
    return replace(text, documents=documents)


def split_documents(text: Text, held_out: float = 0.1, seed: int = 0) -> tuple[Text, Text]:
    """Part the documents in two, training and held-out, so that neither has seen the other.

    Of documents in memory whole ones are drawn at random until they hold the fraction `held_out`
    of the characters; a lone document is cut at the line break nearest that fraction from its end.
    Each document of a stream is held out with that probability, by a draw that depends on the seed
    and its place alone, so that no part need be read to know the other.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    documents = text.documents
    if not isinstance(documents, Sequence):
        train, held = (_part(documents, held_out, seed, side) for side in (False, True))
        return replace(text, documents=train), replace(text, documents=held)
    if len(documents) == 1:
        documents = _cut(documents[0], 1 - held_out)
        drawn = {1}
    else:
        order = random.Random(seed).sample(range(len(documents)), len(documents))
        wanted = held_out * sum(map(len, documents))
        drawn, taken = set[int](), 0
        for index in order[:-1]:
            if taken >= wanted:
                break
            drawn.add(index)
            taken += len(documents[index])
    train = [document for index, document in enumerate(documents) if index not in drawn]
    held = [documents[index] for index in sorted(drawn)]
    return replace(text, documents=train), replace(text, documents=held)


def _written(document: Document) -> bool:
    return bool(document.strip() if isinstance(document, str) else document)


def _part(documents: Iterable[Document], held_out: float, seed: int, side: bool) -> _Stream:
    """The documents of a stream that are held out, or the others."""
    drawn = lambda place: random.Random(f"{seed}:{place}").random() < held_out
    return _Stream(lambda: (d for place, d in enumerate(documents) if drawn(place) == side))


def _cut(document: Document, fraction: float) -> list[Document]:
    """The document in two, at the line break nearest `fraction` of its length, or right there."""
    at = min(max(round(fraction * len(document)), 1), len(document) - 1)
    if not isinstance(document, str):
        return [document[:at], document[at:]]
    breaks = [match.end() for match in re.finditer(r"\n", document.rstrip())]
    at = min(breaks, key=lambda position: abs(position - at), default=at)
    return [document[:at], document[at:]]


def _from_dataset(dataset: str, split: str, column: str | None, limit: int | None) -> Text:
    path = Path(dataset).expanduser()
    if path.exists():
        files = _files_in(path)
        kind = _LOADERS[files[0].suffix]
        held = sum(file.stat().st_size for file in files) <= HELD_BYTES
        if kind == "txt":
            size = HELD_BYTES if held else PIECE
            stream = _Stream(lambda: _pieces(files, dataset, size))
        else:
            source = {"path": kind, "data_files": [str(file) for file in files]}
            stream = _rows(source, "train", column, dataset)
        return Text(dataset, list(islice(stream, limit)) if held else stream, f"local {dataset}")
    if path.suffix in _LOADERS or path.is_absolute() or dataset.startswith((".", "~")):
        raise FileNotFoundError(f"dataset must be a file, a folder or a hub name, got {dataset}")
    name, _, config = dataset.partition(":")
    stream = _rows({"path": name, "name": config or None}, split, column, dataset)
    return Text(dataset, stream, f"dataset {dataset}")


def _rows(source: dict[str, Any], split: str, column: str | None, dataset: str) -> _Stream:
    """The column of documents, read in place: without a copy of the dataset in a cache."""
    datasets = require("datasets", extra="train")
    with _reading(dataset):
        table = datasets.load_dataset(**source, split=split, streaming=True)
        sample = list(islice(table, 100))
    name = _text_column(sample, column, dataset)
    documents = table.select_columns([name])

    def read() -> Iterator[Document]:
        with _reading(dataset):
            for row in documents:
                yield row[name] or ""

    return _Stream(read)


def _pieces(files: list[Path], dataset: str, size: int) -> Iterator[str]:
    """The files in pieces of at most twice `size` characters that end at line breaks, if any."""
    with _reading(dataset):
        for path in files:
            with path.open(encoding="utf-8") as file:
                rest = ""
                while len(block := file.read(size)) == size:
                    text = rest + block
                    end = text.rfind("\n") + 1 or len(text)
                    yield text[:end]
                    rest = text[end:]
                yield rest + block


@contextmanager
def _reading(dataset: str) -> Iterator[None]:
    """Say in one sentence why a dataset cannot be read."""
    try:
        yield
    except StopIteration as error:  # an empty file, to some readers of datasets
        raise ValueError(f"dataset must hold a document, got none in {dataset}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"dataset must be one that can be read here, got {dataset!r}: {reason}; "
            "pass a local file or folder, or nothing for the packaged articles"
        ) from error


def _files_in(path: Path) -> list[Path]:
    """The data files at `path`, sorted, all of one kind."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in found if file.suffix in _LOADERS and file.is_file()]
    if any(file.suffix == ".arrow" for file in files):  # `save_to_disk` describes them in JSON
        files = [file for file in files if file.name not in _BESIDE_ARROW]
    kinds = {_LOADERS[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ValueError(
            f"dataset must hold files of one kind among {', '.join(_LOADERS)}, "
            f"got {', '.join(sorted(kinds)) or 'none of them'} in {path}"
        )
    return files


def _text_column(rows: list[dict[str, Any]], column: str | None, dataset: str) -> str:
    """The column asked for, or `text`, or the only column of strings, or tokens."""
    if not rows:
        raise ValueError(f"dataset must hold a document that is not empty, got none in {dataset}")
    names = list(rows[0])
    strings = [name for name in names if all(isinstance(row[name], str | None) for row in rows)]
    tokens = [name for name in names if all(_is_tokens(row[name]) for row in rows)]
    if column is None:
        named = [name for name in _TOKEN_COLUMNS if name in tokens]
        only = strings if len(strings) == 1 else named
        column = "text" if "text" in strings else next(iter(only), None)
    if column is None or column not in (*strings, *tokens):
        raise ValueError(
            f"text_column must be a column of strings in {dataset}, got {column!r}; its columns of "
            f"strings are {', '.join(strings) or 'none'}, all its columns {', '.join(names)}"
        )
    return column


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)


_HIDDEN_TAGS = {"ref", "table", "gallery", "math", "timeline"}
_HIDDEN_LINKS = ("file:", "image:", "category:", "media:")
_BACK_MATTER = re.compile(
    r"^==\s*(see also|notes|notes and references|references|footnotes|citations|sources"
    r"|bibliography|further reading|external links)\s*==\s*$",
    re.IGNORECASE | re.MULTILINE,
)


def _wikipedia() -> Text | None:
    """The packaged articles, or None without gensim. Stripped once, kept in the cache."""
    dumps = packaged_files("gensim", "gensim/test/test_data/enwiki-latest-pages-articles1*.bz2")
    if not dumps:
        return None
    version = metadata.version("gensim")
    folder = cache_folder() / "text" / f"wikipedia-gensim-{version}"
    if not folder.is_dir():
        parser = require("mwparserfromhell", extra="train")

        def write(target: Path) -> None:
            documents = [
                f"{title}\n\n{_plain(parser, markup)}"
                for dump in dumps
                for title, markup in _articles(dump)
            ]
            (target / "documents.json").write_text(json.dumps(documents), encoding="utf-8")

        publish(folder, write)
    documents = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
    return Text(
        f"wikipedia-gensim-{version}",
        documents,
        f"{len(documents)} articles of the English Wikipedia by their contributors, CC BY-SA, "
        "https://en.wikipedia.org/wiki/ followed by the first line of each document; "
        f"markup removed; as packaged in gensim {version}",
    )


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of the pages in the main namespace that are not redirects."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            ns = page.tag.removesuffix("page")
            markup = page.findtext(f"{ns}revision/{ns}text")
            if markup and page.findtext(f"{ns}ns") == "0" and page.find(f"{ns}redirect") is None:
                yield page.findtext(f"{ns}title", ""), markup
            page.clear()


def _plain(parser: Any, markup: str) -> str:
    """Prose of a page: no templates, notes, tables, pictures, categories or back matter."""
    body = _BACK_MATTER.split(markup, maxsplit=1)[0]
    page = parser.parse(body)
    for tag in page.ifilter_tags():
        if str(tag.tag).lower() in _HIDDEN_TAGS:
            tag.contents = ""
    for link in page.ifilter_wikilinks():
        if str(link.title).strip().lower().startswith(_HIDDEN_LINKS):
            link.text = ""
    text = re.sub(r"[ \t\xa0]+", " ", page.strip_code())
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r" ?\([;, ]*\)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _docstrings(limit: int | None) -> Text:
    """Docstrings of the installed standard library, numpy and torch, one document per file."""
    _log.warning(
        "no packaged articles (pip install --no-deps -r requirements-demo.txt): using docstrings"
    )
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in ("numpy", "torch"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(Path(spec.origin).parent)
    found = (text for root in roots for file in _sources(root) if (text := _docs_in(file)))
    return Text(
        "docstrings",
        list(islice(found, limit)),
        "docstrings of Python (PSF), NumPy and PyTorch (BSD)",
    )


def _sources(root: Path) -> list[Path]:
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    return sorted(
        file for file in root.rglob("*.py") if skipped.isdisjoint(file.relative_to(root).parts)
    )


def _docs_in(file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(doc for doc in docs if doc)
