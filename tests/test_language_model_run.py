"""Settings of a run from a language model, on their way to the parts that they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from fastsae import SAE
from fastsae.cli import main
from fastsae.data.shards import read_index
from fastsae.training.language_model_run import train_side_by_side
from fastsae.training.run_config import LanguageModelRun
from tiny_models import poisoned, save_stories, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("run") / "model"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("run"), 200)


@pytest.fixture
def run(tmp_path, model, stories):
    """64 steps, of rows from two passes of the model, or in a stream."""
    return LanguageModelRun(
        out=tmp_path / "run",
        model=model,
        dataset=stories,
        hook="blocks.0.hook_resid_post",
        context_size=32,
        tokens=4096,
        eval_tokens=320,
        batch_size=64,
        buffer_rows=600,
        sae={"d_sae": 64, "k": 4},
        device="cpu",
    )


def test_so_many_checkpoints_are_kept(run):
    train_side_by_side(replace(run, checkpoints=8, keep=3))
    kept = sorted(path.name for path in (run.out / "checkpoints").iterdir())
    assert kept == [f"step-{step:09}" for step in (48, 56, 64)]


def test_the_revision_reaches_the_model_the_tokenizer_and_the_evaluation(
    run, tmp_path, monkeypatch
):
    asked = []
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):

        def load(*args, own=kind.from_pretrained, **kwargs):
            asked.append(kwargs["revision"])
            loaded = own(*args, **kwargs)
            if isinstance(loaded, transformers.PreTrainedModel):
                loaded.config._commit_hash = "c0ffee"  # as of a model that comes from a hub
            return loaded

        monkeypatch.setattr(kind, "from_pretrained", load)
    text = ["--model", run.model, "--dataset", run.dataset, "--context-size", "32"]
    small = [*text, "--tokens", "640", "--eval-tokens", "64", "--device", "cpu"]
    main(["harvest", "--out", str(tmp_path / "rows"), *small, "--revision", "step1000"])
    assert asked == ["step1000"] * 2
    assert read_index(tmp_path / "rows").source["revision"] == "c0ffee"
    train_side_by_side(replace(run, revision="step3000"))
    assert asked[2:] == ["step3000"] * 2
    saved = run.out / "sae"
    assert SAE.load_from_disk(saved).cfg.metadata["model_revision"] == "c0ffee"
    for options in ([], ["--revision", "step2000"]):
        main(["eval", "--sae", str(saved), "--tokens", "64", "--device", "cpu", *options])
    assert asked[4:] == ["c0ffee"] * 2 + ["step2000"] * 2


@pytest.mark.parametrize("stream, call", [(False, 2), (True, 4)])
def test_nan_stops_a_run_or_its_row_is_skipped(run, monkeypatch, caplog, stream, call):
    run = replace(run, stream=stream)
    with monkeypatch.context() as patched:
        poisoned(patched, float("nan"), call)
        with pytest.raises(ValueError, match="must be finite, got NaN or inf in context"):
            train_side_by_side(run)
    poisoned(monkeypatch, float("nan"), call)
    again = replace(run, out=run.out.with_name("skips"), nonfinite="skip")
    trained = train_side_by_side(again)[""]
    assert "1 rows are skipped" in caplog.text
    assert 0 < trained.report["rows"]["fvu"] < 2


def test_nan_in_a_held_out_row_leaves_the_figures_finite(run, monkeypatch):
    poisoned(monkeypatch, float("nan"), call=3)
    trained = train_side_by_side(replace(run, nonfinite="skip"))[""]
    held_out = trained.held_out
    assert held_out is not None
    assert held_out.n_massive == 0
    assert len(held_out.rows) + len(held_out.excluded) == held_out.tokens.numel() - 1
    assert 0 < trained.report["all_rows"]["fvu"] < 2
