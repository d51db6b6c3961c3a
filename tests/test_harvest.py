"""Harvests to a folder: which rows are in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastsae.cli import main
from fastsae.data import capture, harvest, load_language_model, load_text, split_documents, tokenize
from fastsae.data.harvest_run import HELD_OUT, harvest_to_disk
from fastsae.data.hooks import capture_all, resolve_hook
from fastsae.data.shards import ActivationShards, read_index
from fastsae.data.tokens import separator_id
from harvests import HOOKS, rows_of, small_harvest
from tiny_models import poisoned, save_stories, save_tiny_llama, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("harvest") / "model"))


@pytest.fixture(scope="module")
def lm(model):
    return load_language_model(model)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("harvest"), 600)


@pytest.fixture
def run(tmp_path, model, stories):
    return small_harvest(tmp_path / "rows", model, stories)


def test_several_hooks_share_a_pass_that_ends_at_the_last(monkeypatch):
    lm = tiny_llama(num_hidden_layers=3)
    tokens = torch.randint(50, (2, 7))
    names = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    hooks = [resolve_hook(lm, name) for name in names]
    alone = [capture(lm, hook, tokens) for hook in hooks]
    ran = []
    for i, layer in enumerate(lm.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    together = capture_all(lm, hooks, tokens)
    assert ran == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("drop_special", [True, False])
def test_rows_are_those_of_a_harvest_in_memory(run, lm, stories, drop_special):
    run = replace(run, drop_special=drop_special)
    index = harvest_to_disk(run, lm=lm)
    train, held_out = split_documents(load_text(stories))
    for folder, text, n in ((run.out, train, 20_000), (run.out / HELD_OUT, held_out, 1000)):
        tokens = tokenize(text, lm.tokenizer, context_size=32, n_tokens=n)
        for hook in HOOKS:
            options = {"drop_special": drop_special, "batch_contexts": 16}
            held = harvest(lm, resolve_hook(lm, hook), tokens, **options)
            assert torch.equal(rows_of(folder, hook), held.rows)
    assert (index.rows == 31 * 625) != drop_special
    assert [s.contexts for s in index.shards] == [256, 256, 113]
    assert index.complete and index.widths == dict.fromkeys(HOOKS, 16)


def test_context_position_and_tokens_find_the_text_of_a_row(run, lm):
    harvest_to_disk(run, lm=lm)
    shards = ActivationShards(run.out)
    hook = resolve_hook(lm, HOOKS[1])
    where, rows = shards.where(1), shards.rows(HOOKS[1], 1)
    again = capture(lm, hook, where.tokens[:16].long())
    first = where.context < 16
    at = (where.context[first].long(), where.position[first].long())
    assert torch.equal(rows[first], again[at])
    separator = separator_id(lm.tokenizer)
    assert (where.tokens == separator).any() and where.position.min() == 1
    assert not (where.tokens[where.context.long(), where.position.long()] == separator).any()


def test_model_goes_no_further_than_the_last_hook(run, lm, monkeypatch):
    harvest_to_disk(replace(run, hooks=HOOKS[:1], tokens=640, eval_tokens=0), lm=lm)
    ran = []
    monkeypatch.setattr(lm.model.model.layers[1], "forward", lambda *_, **__: ran.append(1))
    harvest_to_disk(
        replace(run, out=run.out.with_name("b"), hooks=HOOKS[:1], tokens=640, eval_tokens=0), lm=lm
    )
    assert ran == []


def test_default_hook_and_dtype(run, lm):
    index = harvest_to_disk(replace(run, hooks=(), tokens=640, eval_tokens=0), lm=lm)
    assert list(index.widths) == ["blocks.1.hook_resid_post"] and index.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_rows(run, lm, dtype):
    harvest_to_disk(replace(run, dtype=dtype, tokens=2000), lm=lm)
    harvest_to_disk(replace(run, out=run.out.with_name("wide"), tokens=2000), lm=lm)
    narrow, wide = (rows_of(run.out.with_name(n), HOOKS[0]) for n in ("rows", "wide"))
    assert narrow.dtype == getattr(torch, dtype)
    assert torch.equal(narrow, wide.to(narrow.dtype))


def test_float16_overflow_is_an_error_that_names_shard_and_row(run, lm, monkeypatch):
    poisoned(monkeypatch, 70_000.0, call=35)
    with pytest.raises(ValueError) as error:
        harvest_to_disk(replace(run, dtype="float16", eval_tokens=0, massive_multiple=None), lm=lm)
    shards = read_index(run.out).shards
    assert len(shards) == 1
    for said in ("dtype must hold", HOOKS[0], "70000", "bfloat16", "shard 1 at row"):
        assert said in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_stops_and_names_shard_and_row(run, lm, monkeypatch, value):
    poisoned(monkeypatch, value, call=18)  # the second pass of the second shard
    with pytest.raises(ValueError, match="must be finite, got NaN or inf in shard 1 at row") as e:
        harvest_to_disk(replace(run, eval_tokens=0, drop_special=False), lm=lm)
    # 16 contexts of the first pass, two of this one, and 4 positions after the first.
    assert f"row {18 * 31 + 4}, context {256 + 18} of the text at position 5" in str(e.value)
    monkeypatch.undo()
    assert harvest_to_disk(replace(run, eval_tokens=0, drop_special=False), lm=lm).complete


def test_nonfinite_rows_can_be_skipped(run, lm, monkeypatch, caplog):
    whole = harvest_to_disk(replace(run, eval_tokens=0), lm=lm)
    poisoned(monkeypatch, float("nan"), call=18)
    other = replace(run, out=run.out.with_name("skipped"), eval_tokens=0, nonfinite="skip")
    index = harvest_to_disk(other, lm=lm)
    assert index.rows == whole.rows - 1
    assert [shard.left_out["nonfinite"] for shard in index.shards] == [0, 1, 0]
    assert "1 rows are skipped" in caplog.text
    assert rows_of(other.out, HOOKS[0]).isfinite().all()


def test_massive_rows_are_left_out_at_every_hook(run, lm, monkeypatch):
    whole = harvest_to_disk(replace(run, eval_tokens=0), lm=lm)
    poisoned(monkeypatch, 1000.0, call=18)
    other = replace(run, out=run.out.with_name("massive"), eval_tokens=0)
    index = harvest_to_disk(other, lm=lm)
    assert index.rows == whole.rows - 1
    assert index.shards[1].left_out["massive"] == whole.shards[1].left_out["massive"] + 1
    assert len(rows_of(other.out, HOOKS[1])) == index.rows


def test_context_longer_than_the_models_is_refused(run, lm):
    with pytest.raises(ValueError, match="^context_size must be at most 64, .* got 65"):
        harvest_to_disk(replace(run, context_size=65), lm=lm)


def test_a_text_that_ends_early_is_harvested_to_its_end(run, lm, caplog):
    index = harvest_to_disk(replace(run, tokens=10**9 // 10**3, eval_tokens=0), lm=lm)
    every = harvest_to_disk(
        replace(run, out=run.out.with_name("all"), tokens=None, eval_tokens=0), lm=lm
    )
    assert index.complete and index.shards == every.shards
    assert "the text holds" in caplog.text


def test_tokens_of_a_dataset_are_taken_as_they_are(run, lm, tmp_path):
    import datasets

    tokens = torch.randint(100, 1000, (40, 32))
    datasets.Dataset.from_dict({"input_ids": tokens.tolist()}).save_to_disk(tmp_path / "arrow")
    harvest_to_disk(
        replace(run, dataset=str(tmp_path / "arrow"), tokens=None, eval_tokens=32), lm=lm
    )
    found = torch.cat(
        [ActivationShards(folder).where(0).tokens for folder in (run.out, run.out / HELD_OUT)]
    )
    assert sorted(found.tolist()) == sorted(tokens.tolist()[: len(found)]) or {
        tuple(row) for row in found.tolist()
    } <= {tuple(row) for row in tokens.tolist()}


def test_a_bridge_of_transformer_lens_is_harvested(run, lm):
    from transformer_lens.model_bridge import TransformerBridge

    from fastsae.interop.transformer_lens import from_bridge

    own = load_language_model(run.model)
    bridge = TransformerBridge.boot_transformers(
        run.model, hf_model=own.model, tokenizer=own.tokenizer
    )
    small = replace(run, tokens=640, eval_tokens=0, hooks=HOOKS[:1])
    harvest_to_disk(replace(small, out=run.out.with_name("bridge")), lm=from_bridge(bridge))
    harvest_to_disk(small, lm=lm)
    bridged, plain = (rows_of(run.out.with_name(n), HOOKS[0]) for n in ("bridge", "rows"))
    assert torch.allclose(bridged, plain, atol=1e-5)


def test_command(run, capsys, tmp_path):
    arguments = ["harvest", "--out", str(run.out), "--model", run.model, "--dataset", run.dataset]
    small = ["--context-size", "32", "--tokens", "2000", "--eval-tokens", "64", "--device", "cpu"]
    main([*arguments, *small, "--hooks", *HOOKS])
    said = capsys.readouterr()
    assert "float32 rows of 2016 tokens" in said.out and "tok/s" in said.err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *small, "--hooks", "blocks.0.hook_resid_pots"])
    assert stop.value.code == 1
    assert "nearest: blocks.0.hook_resid_post" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    for dataset, message in (("empty.jsonl", "got none in"), ("rows.jsonl", "text_column must be")):
        (tmp_path / "rows.jsonl").write_text('{"n": 1}\n')
        with pytest.raises(SystemExit):
            main(
                ["harvest", *small, "--model", run.model, "--out", str(tmp_path / "other")]
                + ["--dataset", str(tmp_path / dataset)]
            )
        assert message in capsys.readouterr().err
