"""Documents from packages and files, their split, and the contexts made of them."""

from __future__ import annotations

import itertools
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastsae.data import Text, load_language_model, load_text, split_documents, tokenize
from fastsae.data.tokens import separator_id


@pytest.fixture(scope="module")
def tokenizer():
    return load_language_model().tokenizer


@pytest.fixture(scope="module")
def articles() -> Text:
    return load_text()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"story": f"story {i}", "title": f"title {i}", "n": i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(*documents: str) -> Text:
    return Text("test", documents, "nobody")


def test_articles_are_prose(articles: Text):
    documents = [d for d in articles.documents if isinstance(d, str)]
    assert len(documents) == 106
    assert sum(map(len, documents)) > 2_700_000
    assert documents[0].startswith("Anarchism\n\nAnarchism is a political philosophy that")
    markup = re.compile(r"\[\[|\{\{|<ref|thumb\||\[\[File|Category:")
    assert sum(len(markup.findall(document)) for document in documents) < 30
    assert "CC BY-SA" in articles.attribution
    assert "gensim 4.4.0" in articles.attribution


def test_articles_are_stripped_once(
    articles: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "text" / articles.name
    folder.mkdir(parents=True)
    (folder / "documents.json").write_text(json.dumps(["kept", " \n"]))
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path))
    assert load_text().documents == ["kept"]


def test_cache_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="^cache folder .* must be writable .* FASTSAE_CACHE"):
        load_text()


def test_docstrings_serve_without_the_articles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sys, "path", [sysconfig.get_path("stdlib")])
    text = load_text(limit=20)
    assert text.name == "docstrings"
    assert len(list(text.documents)) == 20
    assert "abstract base classes" in " ".join(map(str, text.documents)).lower()
    assert "requirements-demo.txt" in caplog.text


def test_column_of_a_jsonl_file(jsonl: Path):
    text = load_text(jsonl, text_column="story")
    assert text.documents == [f"story {i}" for i in range(5)]
    assert load_text(jsonl, text_column="story", limit=2).documents == ["story 0", "story 1"]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_only_column_of_strings(tmp_path: Path, suffix: str):
    import datasets

    table = datasets.Dataset.from_dict({"n": [1, 2, 3], "body": ["one", "", "three"]})
    path = tmp_path / f"rows.{suffix}"
    getattr(table, f"to_{suffix}")(path)
    assert load_text(path).documents == ["one", "three"]


def test_column_called_text_comes_first(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "words"}\n')
    assert load_text(tmp_path / "rows.jsonl").documents == ["words"]


def test_folder_of_text_files_is_read_in_order(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first\n\nstill first")
    (tmp_path / "notes.md").write_text("other")
    assert load_text(tmp_path).documents == ["first\n\nstill first", "second"]


@pytest.mark.parametrize("column", ["body", "n", None])
def test_wrong_column_is_refused(jsonl: Path, column: str | None):
    rule = (
        rf"^text_column must be .* got {column!r}; .* strings are story, title, .* story, title, n"
    )
    with pytest.raises(ValueError, match=rule):
        load_text(jsonl, text_column=column)


@pytest.mark.parametrize("content", ["", '{"text": " "}\n{"text": ""}\n'], ids=["file", "rows"])
def test_empty_dataset_is_refused(tmp_path: Path, content: str):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match="^dataset must hold a document.* got none in"):
        load_text(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["/nowhere/rows", "rows.parquet", "./rows"])
def test_path_to_nothing_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # what lies where the tests are started is no part of them
    with pytest.raises(FileNotFoundError, match="^dataset must be a file, a folder or a hub name"):
        load_text(name)


def test_dataset_absent_from_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match="^dataset must be .* got 'no-such/dataset': .*local file"
    ):
        load_text("no-such/dataset")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "words"}\n{"text": "wor'),
        ("rows.parquet", b"PAR1 and no more"),
        ("text.txt", b"caf\xe9"),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match="^dataset must be one that can be read here, got"):
        load_text(tmp_path / name)


def test_folder_of_two_kinds_is_refused(tmp_path: Path, jsonl: Path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(
        ValueError, match="^dataset must hold files of one kind .* got json, txt in"
    ):
        load_text(tmp_path)


def test_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="^limit must be at least 1, got 0"):
        load_text(limit=0)


def test_split_parts_the_documents(articles: Text):
    train, held_out = split_documents(articles)
    assert sorted([*train.documents, *held_out.documents]) == sorted(articles.documents)
    sizes = [sum(map(len, part.documents)) for part in (train, held_out)]
    assert 0.1 <= sizes[1] / sum(sizes) < 0.14
    assert (train.attribution, held_out.attribution) == (articles.attribution,) * 2
    assert split_documents(articles) == (train, held_out)
    assert split_documents(articles, seed=1)[1].documents != held_out.documents


def test_split_leaves_both_parts_a_document():
    for held_out in (0.01, 0.99):
        train, held = split_documents(texts("a", "b" * 50), held_out)
        assert len(list(train.documents)) == len(list(held.documents)) == 1


def test_lone_document_is_cut_at_a_line():
    document = "line one\nline two\nline three\nline four\n"
    train, held_out = split_documents(texts(document), 0.3)
    assert train.documents == ["line one\nline two\nline three\n"]
    assert held_out.documents == ["line four\n"]
    train, held_out = split_documents(texts("no break"), 0.1)
    assert (train.documents, held_out.documents) == (["no brea"], ["k"])


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.5])
def test_held_out_fraction_is_refused(held_out: float):
    with pytest.raises(ValueError, match="^held_out must be between 0 and 1, got"):
        split_documents(texts("a", "b"), held_out)


STORIES = [f"Story {i} is about {i} boats and {7 * i % 11} bridges." for i in range(300)]


def endless_hub(read: list[int]):
    """`datasets.load_dataset` of a hub whose dataset never ends; notes which rows are read."""
    import datasets

    def rows():
        for i in itertools.count():
            read.append(i)
            yield {"text": STORIES[i % len(STORIES)] if i % 5 else " "}

    def load_dataset(path: str, name: str | None, split: str, streaming: bool):
        assert (path, name, split, streaming) == ("some/stories", "english", "test", True)
        return datasets.IterableDataset.from_generator(rows)

    return load_dataset


def test_hub_dataset_is_read_as_far_as_the_tokens_need(tokenizer, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    monkeypatch.setattr("datasets.load_dataset", endless_hub(read))
    text = load_text("some/stories:english", split="test")
    train, held_out = split_documents(text)
    contexts = tokenize(train, tokenizer, context_size=32, n_tokens=2000)
    assert contexts.shape == (63, 32)
    assert max(read) < 400
    read.clear()
    assert torch.equal(tokenize(train, tokenizer, context_size=32, n_tokens=2000), contexts)
    assert read[0] == 0
    assert tokenize(held_out, tokenizer, context_size=32, n_tokens=100).shape == (4, 32)
    three = load_text("some/stories:english", split="test", limit=3)
    assert list(three.documents) == STORIES[1:4]


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One folder with the stories for each kind of file, all taken for large ones."""
    import datasets

    table = datasets.Dataset.from_dict({"text": STORIES})
    for kind in ("jsonl", "parquet", "txt"):
        (tmp_path / kind).mkdir()
    for half in (0, 1):
        part = table.select(range(150 * half, 150 * half + 150))
        part.to_json(tmp_path / "jsonl" / f"{half}.jsonl")
        part.to_parquet(tmp_path / "parquet" / f"{half}.parquet")
    for i, story in enumerate(STORIES):
        (tmp_path / "txt" / f"{i:03}.txt").write_text(story)
    monkeypatch.setattr("fastsae.data.text.HELD_BYTES", 0)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_large_local_files_are_streamed_in_order(stories: Path, kind: str):
    text = load_text(stories / kind)
    assert not isinstance(text.documents, list)
    assert list(text.documents) == list(text.documents) == STORIES


def test_a_large_text_file_is_streamed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsae.data.text.HELD_BYTES", 0)
    monkeypatch.setattr("fastsae.data.text.PIECE", 100)
    lines = "".join(f"Line {i} of a long file.\n" for i in range(200))
    for name, content in (("lines", lines), ("one line", lines.replace("\n", " "))):
        file = tmp_path / f"{name}.txt"
        file.write_text(content)
        text = load_text(file)
        pieces = [str(d) for d in text.documents]
        assert "".join(pieces) == content and max(map(len, pieces)) < 200 and len(pieces) > 40
        assert all(d.endswith("\n") for d in pieces) == (name == "lines")
        train, held_out = split_documents(text)
        assert sorted([*train.documents, *held_out.documents]) == sorted(pieces)
        assert 0 < len(list(held_out.documents)) < len(pieces) / 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_what_lies_beyond_the_tokens_is_not_read(stories: Path, tokenizer, kind: str):
    for file in sorted((stories / kind).iterdir())[len(list((stories / kind).iterdir())) // 2 :]:
        file.write_bytes(b"\xff damaged")
    train, _ = split_documents(load_text(stories / kind))
    assert len(tokenize(train, tokenizer, context_size=16, n_tokens=640)) == 40
    with pytest.raises(RuntimeError, match="^dataset must be one that can be read here, got"):
        tokenize(train, tokenizer, context_size=16)


def test_a_stream_is_parted_by_seed_and_place(stories: Path):
    text = load_text(stories / "jsonl")
    train, held_out = split_documents(text)
    assert sorted([*train.documents, *held_out.documents]) == sorted(STORIES)
    assert 15 <= len(list(held_out.documents)) <= 45
    assert list(split_documents(text)[1].documents) == list(held_out.documents)
    assert list(split_documents(text, seed=1)[1].documents) != list(held_out.documents)
    shorter = split_documents(load_text(stories / "jsonl", limit=150))[1]
    assert list(shorter.documents) == [d for d in held_out.documents if d in STORIES[:150]]


def test_a_stream_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsae.data.text.HELD_BYTES", 0)
    (tmp_path / "rows.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(ValueError, match="^dataset must hold a document.* got none in"):
        load_text(tmp_path / "rows.jsonl")


def test_so_many_tokens_are_the_first_contexts_of_all(tokenizer):
    text = texts(*STORIES)
    whole = tokenize(text, tokenizer, context_size=32)
    assert len(whole) > 150
    for n_tokens, contexts in ((1, 1), (32, 1), (33, 2), (3200, 100), (10**9, len(whole))):
        part = tokenize(text, tokenizer, context_size=32, n_tokens=n_tokens)
        assert torch.equal(part, whole[:contexts])
    with pytest.raises(ValueError, match="^n_tokens must be at least 1 or None, got 0"):
        tokenize(text, tokenizer, n_tokens=0)


def test_contexts_are_the_documents_and_separators(tokenizer):
    text = texts("One two three four five.", "Six seven eight nine.")
    stream = []
    for document in text.documents:
        stream += [*tokenizer(document).input_ids, separator_id(tokenizer)]
    contexts = tokenize(text, tokenizer, context_size=4, prepend_bos=False)
    assert contexts.dtype == torch.int64
    assert contexts.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert tokenizer.decode([separator_id(tokenizer)]) == "<|endoftext|>"


def test_bos_goes_in_front_of_every_context(tokenizer):
    text = texts("One two three four five. Six seven eight nine.")
    contexts = tokenize(text, tokenizer, context_size=5)
    assert contexts[:, 0].tolist() == [tokenizer.bos_token_id] * len(contexts)
    assert torch.equal(
        contexts[:, 1:], tokenize(text, tokenizer, context_size=4, prepend_bos=False)
    )


def test_text_too_short_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="^text must fill one context of 127 tokens, got 3 in test"
    ):
        tokenize(texts("Two words"), tokenizer)


def test_context_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="^context_size must be at least 2, got 1"):
        tokenize(texts("words"), tokenizer, context_size=1)


def test_bos_of_a_tokenizer_without_one_is_refused():
    import transformers

    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=_characters())
    assert tokenize(texts("abab"), bare, context_size=2).tolist() == [[0, 1], [0, 1]]
    with pytest.raises(
        ValueError, match="^prepend_bos must be False for a tokenizer without a bos"
    ):
        tokenize(texts("abab"), bare, context_size=2, prepend_bos=True)


def _characters():
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
