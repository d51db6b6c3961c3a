"""Documents from packages and files, their split, and the contexts made of them."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastsae.data import Text, load_language_model, load_text, split_documents, tokenize
from fastsae.data.text import separator_id


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
    assert len(articles.documents) == 106
    assert sum(map(len, articles.documents)) > 2_700_000
    assert articles.documents[0].startswith("Anarchism\n\nAnarchism is a political philosophy that")
    markup = re.compile(r"\[\[|\{\{|<ref|thumb\||\[\[File|Category:")
    assert sum(len(markup.findall(document)) for document in articles.documents) < 30
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
    assert len(text.documents) == 20
    assert "abstract base classes" in " ".join(text.documents).lower()
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
def test_path_to_nothing_is_refused(name: str):
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
        assert len(train.documents) == len(held.documents) == 1


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
