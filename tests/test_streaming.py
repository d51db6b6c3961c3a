"""A language model that runs beside the training, its rows mixed in a buffer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from fastsae.data import harvest, load_language_model, load_text, resolve_hook, tokenize
from fastsae.data.model_rows import RowRules
from fastsae.data.streaming import StreamedRows
from fastsae.training.language_model_run import train_side_by_side
from fastsae.training.run_config import LanguageModelRun
from tiny_models import save_stories, save_tiny_llama

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("streaming"), 120)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_language_model(str(save_tiny_llama(tmp_path_factory.mktemp("streaming") / "model")))


@pytest.fixture(scope="module")
def whole(lm, stories):
    """All rows of the text at each hook, in its order."""
    tokens = tokenize(load_text(stories), lm.tokenizer, context_size=32, n_tokens=10**9)
    return {name: harvest(lm, resolve_hook(lm, name), tokens) for name in HOOKS}


@pytest.fixture
def streamed(lm, stories, whole):
    def make(**changes):
        options = {
            "context_size": 32,
            "rules": RowRules(dropped_tokens=lm.special_ids, massive_multiple=None),
            "median_norms": {name: rows.median_norm for name, rows in whole.items()},
            "buffer_rows": 600,
            **changes,
        }
        hooks = [resolve_hook(lm, name) for name in HOOKS]
        return StreamedRows(lm, hooks, load_text(stories), 100, **options)

    return make


def keys(rows):
    return Counter(row.tobytes() for row in rows.view(torch.int32).numpy())


def test_batches_hold_the_models_rows_each_once_a_pass(streamed, whole):
    rows = whole[HOOKS[0]].rows
    n_batches = (len(rows) - 600) // 100
    batches = list(islice(streamed().from_step(0), n_batches))
    taken = keys(torch.cat([batch[HOOKS[0]] for batch in batches]))
    # Half of the last round's buffer may be of the second pass over the text.
    assert sum((taken & keys(rows)).values()) >= (n_batches - 6) * 100
    assert not taken - (keys(rows) + keys(rows))


def test_a_row_of_a_batch_is_the_same_token_at_every_hook(streamed, whole):
    place = {row.tobytes(): i for i, row in enumerate(whole[HOOKS[0]].rows.numpy())}
    batch = list(islice(streamed().from_step(0), 8))[-1]
    at = [place[row.tobytes()] for row in batch[HOOKS[0]].numpy()]
    assert torch.equal(batch[HOOKS[1]], whole[HOOKS[1]].rows[at])
    assert (torch.tensor(at).diff() == 1).sum() < 5


@pytest.mark.parametrize("changes", [{"ahead": 0}, {"ahead": 3}])
def test_batches_are_a_function_of_the_seed(streamed, changes):
    first = lambda rows: torch.stack([b[HOOKS[0]] for b in islice(rows.from_step(0), 20)])
    wanted = first(streamed(seed=1))
    assert torch.equal(first(streamed(seed=1, **changes)), wanted)
    assert not torch.equal(first(streamed(seed=2, **changes)), wanted)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.8])
def test_batches_go_on_from_any_step_across_the_end_of_the_text(streamed, whole, mixing):
    rows = streamed(mixing=mixing)
    n_batches = 2 * len(whole[HOOKS[0]].rows) // 100
    wanted = list(islice(rows.from_step(0), n_batches))
    for step in (1, 7, n_batches - 2):
        for batch, expected in zip(rows.from_step(step), wanted[step:], strict=False):
            assert torch.equal(batch[HOOKS[1]], expected[HOOKS[1]])


def test_a_run_resumes_to_the_same_bits(lm, stories, tmp_path):
    run = LanguageModelRun(
        out=tmp_path / "whole",
        model=lm.name,
        dataset=stories,
        context_size=32,
        stream=True,
        buffer_rows=1000,
        hook=HOOKS[0],
        tokens=64 * 40,
        batch_size=64,
        eval_tokens=256,
        sae={"d_sae": 64, "k": 4},
        device="cpu",
    )
    whole = train_side_by_side(run)[""]
    part = replace(run, out=tmp_path / "part")
    train_side_by_side(part)
    checkpoints = sorted((part.out / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    for file in checkpoints[-1].iterdir():
        file.unlink()
    checkpoints[-1].rmdir()
    resumed = train_side_by_side(replace(part, resume=True))[""]
    for name, parameter in whole.sae.state_dict().items():
        assert torch.equal(parameter, resumed.sae.state_dict()[name]), name


def test_bad_arguments_are_refused(streamed, tmp_path):
    with pytest.raises(ValueError, match=r"mixing must be in \[0, 1\), got 1"):
        streamed(mixing=1.0)
    with pytest.raises(ValueError, match="buffer_rows must hold a batch .*, got buffer_rows 150"):
        streamed(buffer_rows=150)
    with pytest.raises(ValueError, match="harvest_tokens must be None with stream, got 1000"):
        LanguageModelRun(out=tmp_path, stream=True, harvest_tokens=1000)
    with pytest.raises(ValueError, match="stream must be left to the harvest"):
        LanguageModelRun(out=tmp_path, stream=True, activations=tmp_path)
