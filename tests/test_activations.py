"""Harvested rows: what is kept, what is set aside, where each row came from."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor

from fastsae.data import (
    Activations,
    LanguageModel,
    RowFilter,
    Text,
    capture,
    harvest,
    harvest_all,
    load_language_model,
    resid_hook_name,
    resolve_hook,
    tokenize,
)
from tiny_models import NO_TOKENIZER, tiny_llama

STORY = (
    "The river rose for three days before anyone thought to move the boats. By then the mill was "
    "under water, and the old bridge had gone with a noise that was heard in the next village. "
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    lm = tiny_llama()
    lm.model.model.embed_tokens.weight[7] *= 40  # a massive token, as real models have
    return lm


@pytest.fixture(scope="module")
def hook(lm: LanguageModel):
    return resolve_hook(lm, resid_hook_name(0))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(50, (20, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def harvested(lm: LanguageModel, hook, tokens: Tensor) -> Activations:
    return harvest(lm, hook, tokens)


def test_rows_are_the_captured_activations(lm: LanguageModel, hook, tokens: Tensor, harvested):
    x = capture(lm, hook, tokens)
    where = harvested.context_of.long(), harvested.position_of.long()
    assert torch.equal(harvested.rows, x[where])
    assert harvested.rows.is_contiguous()
    assert (harvested.position_of > 0).all()
    index = harvested.context_of * tokens.shape[1] + harvested.position_of
    assert (index.diff() > 0).all()


def test_massive_and_first_rows_are_set_aside(lm: LanguageModel, hook, tokens: Tensor, harvested):
    norms = capture(lm, hook, tokens).norm(dim=-1)
    median = norms[:, 1:].median().item()
    assert harvested.median_norm == pytest.approx(median)
    assert harvested.norm_limit == pytest.approx(10 * median)
    massive = tokens[:, 1:] == 7
    assert harvested.n_massive == massive.sum() > 0
    assert harvested.n_first == len(tokens)
    assert len(harvested.rows) == (~massive).sum()
    assert len(harvested.excluded) == harvested.n_massive + harvested.n_first
    total = harvested.rows.square().sum() + harvested.excluded.square().sum()
    assert total.item() == pytest.approx(norms.square().sum().item())


def test_nothing_need_be_set_aside(lm: LanguageModel, hook, tokens: Tensor):
    everything = harvest(lm, hook, tokens, skip_first=0, massive_multiple=float("inf"))
    assert torch.equal(everything.rows, capture(lm, hook, tokens).flatten(0, 1))
    assert (everything.n_first, everything.n_massive, len(everything.excluded)) == (0, 0, 0)


def test_row_filter_agrees_with_harvest(lm: LanguageModel, hook, tokens: Tensor, harvested):
    keep = harvested.row_filter.keep(capture(lm, hook, tokens), tokens)
    assert torch.equal(torch.stack(keep.nonzero(as_tuple=True)).int(), harvested_where(harvested))
    ones, three = torch.ones(1, 3, 4), torch.tensor([[5, 6, 7]])
    assert RowFilter(skip_first=0).keep(ones, three).all()
    some = RowFilter(skip_first=1, dropped_tokens=(5, 7)).keep(ones, three)
    assert some.tolist() == [[False, True, False]]


def harvested_where(harvested: Activations) -> Tensor:
    return torch.stack([harvested.context_of, harvested.position_of])


@pytest.mark.parametrize("batch_contexts", [1, 3, 20])
def test_batches_do_not_matter(lm: LanguageModel, hook, tokens, harvested, batch_contexts: int):
    other = harvest(lm, hook, tokens, batch_contexts=batch_contexts)
    torch.testing.assert_close(other.rows, harvested.rows)
    assert torch.equal(harvested_where(other), harvested_where(harvested))
    assert other.median_norm == pytest.approx(harvested.median_norm, rel=1e-6)


def test_several_hooks_share_a_pass_and_nothing_else(lm: LanguageModel, hook, tokens: Tensor):
    other = resolve_hook(lm, "blocks.1.hook_mlp_out")
    options = {"massive_multiple": 1.1, "batch_contexts": 7}
    together = harvest_all(lm, [hook, other], tokens, **options)
    alone = [harvest(lm, one, tokens, **options) for one in (hook, other)]
    assert len(together[0].rows) != len(together[1].rows)
    for both, one in zip(together, alone, strict=True):
        for name in ("rows", "context_of", "position_of", "excluded"):
            assert torch.equal(getattr(both, name), getattr(one, name)), name
        assert (both.row_filter, both.n_massive) == (one.row_filter, one.n_massive)


def test_later_contexts_do_not_move_the_median(lm: LanguageModel, hook):
    tokens = torch.randint(50, (200, 64), generator=torch.Generator().manual_seed(1))
    calibrated = -(-8192 // 63)
    short = harvest(lm, hook, tokens[:calibrated], batch_contexts=calibrated)
    long = harvest(lm, hook, tokens, batch_contexts=calibrated)
    assert long.median_norm == short.median_norm
    assert torch.equal(long.rows[: len(short.rows)], short.rows)
    assert len(long.rows) > len(short.rows)


def test_progress_counts_tokens(lm: LanguageModel, hook, tokens: Tensor):
    seen: list[tuple[int, int]] = []
    harvest(lm, hook, tokens, batch_contexts=8, progress=lambda *done: seen.append(done))
    assert seen == [(128, 320), (256, 320), (320, 320)]


def test_rows_in_another_dtype(lm: LanguageModel, hook, tokens: Tensor, harvested):
    rows = harvest(lm, hook, tokens, dtype=torch.bfloat16).rows
    assert torch.equal(rows, harvested.rows.bfloat16())


def test_rows_of_a_bfloat16_model_are_its_own_bits(lm: LanguageModel, tokens: Tensor):
    narrow = LanguageModel("narrow", copy.deepcopy(lm.model).bfloat16(), NO_TOKENIZER)
    hook = resolve_hook(narrow, resid_hook_name(0))
    found = harvest(narrow, hook, tokens)
    where = found.context_of.long(), found.position_of.long()
    assert found.rows.dtype == found.excluded.dtype == torch.bfloat16
    assert torch.equal(found.rows, capture(narrow, hook, tokens)[where])


def test_default_model_has_the_rows_that_are_set_aside():
    lm = load_language_model()
    text = Text("story", [STORY, STORY[::-1], STORY.upper()], "none")
    tokens = tokenize(text, lm.tokenizer, context_size=32)
    hook = resolve_hook(lm, resid_hook_name(15))
    harvested = harvest(lm, hook, tokens)
    first = harvested.excluded.norm(dim=-1).max().item()
    assert 100 < first / harvested.median_norm < 200
    # The separator between documents is as massive wherever it stands.
    kept = harvest(lm, hook, tokens, drop_special=False)
    assert harvested.n_special == kept.n_massive == (tokens[:, 1:] == 0).sum() > 0
    assert harvested.n_massive == kept.n_special == 0
    assert torch.equal(harvested.rows, kept.rows)
    assert harvested.rows.norm(dim=-1).max() < 3 * harvested.median_norm


def test_nan_is_refused(lm: LanguageModel, tokens: Tensor):
    hook = resolve_hook(lm, "blocks.0.hook_resid_pre")  # before attention spreads it
    weight = lm.model.model.embed_tokens.weight
    kept = weight[9].clone()
    weight[9] = float("nan")
    context, position = (tokens == 9).nonzero()[0].tolist()
    try:
        where = f"NaN or inf in context {context} at position {position}; "
        with pytest.raises(ValueError, match="^activations at .* must be finite, got " + where):
            harvest(lm, hook, tokens, batch_contexts=2)
    finally:
        weight[9] = kept


@pytest.mark.parametrize(
    ("dtype", "token_scale", "expected"),
    [
        (torch.float16, 1.0, torch.float16),
        (torch.float16, 1e7, torch.float32),
        (torch.bfloat16, 1e7, torch.bfloat16),
    ],
    ids=["fits", "too-narrow", "wide-enough"],
)
def test_rows_that_their_dtype_cannot_hold_are_kept_in_float32(
    lm: LanguageModel, tokens: Tensor, caplog, dtype, token_scale: float, expected
):
    hook = resolve_hook(lm, "blocks.0.hook_resid_pre")
    weight = lm.model.model.embed_tokens.weight
    kept = weight[9].clone()
    weight[9] *= token_scale
    tokens = tokens.clone()
    tokens[:3][tokens[:3] == 9] = 8  # the first rows are stored before a large one comes
    try:
        found = harvest(
            lm, hook, tokens, dtype=dtype, batch_contexts=2, massive_multiple=float("inf")
        )
        x = capture(lm, hook, tokens)[:, 1:].flatten(0, 1)
    finally:
        weight[9] = kept
    assert found.rows.dtype == expected
    assert found.rows.isfinite().all()
    torch.testing.assert_close(found.rows.float(), x, rtol=8e-3, atol=1e-4)
    warned = "rows at blocks.0.hook_resid_pre are kept in torch.float32: max|x| of"
    assert (warned in caplog.text) == (expected != dtype)
    if expected != dtype:
        assert found.rows.abs().max() > torch.finfo(dtype).max


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(0, 8, dtype=torch.long)}, r"^tokens must have the shape \[n, L\]"),
        (
            {"tokens": torch.zeros(1, 65, dtype=torch.long)},
            "^tokens must have at most 64 positions",
        ),
        ({"tokens": torch.full((1, 8), 50)}, "^tokens must be from 0 to 49, .* got 50 to 50"),
        ({"tokens": torch.full((1, 8), -1)}, "^tokens must be from 0 to 49, .* got -1 to -1"),
        ({"batch_contexts": 0}, "^batch_contexts must be at least 1, got 0"),
        ({"skip_first": 16}, "^skip_first must be from 0 to L - 1 = 15, got 16"),
        ({"massive_multiple": 1.0}, "^massive_multiple must be more than 1, got 1.0"),
    ],
)
def test_bad_argument_is_refused(lm: LanguageModel, hook, tokens: Tensor, change, message: str):
    with pytest.raises(ValueError, match=message):
        harvest(lm, hook, **{"tokens": tokens, **change})


def test_float_tokens_are_refused(lm: LanguageModel, hook, tokens: Tensor):
    with pytest.raises(TypeError, match="^tokens must be integers, got torch.float32"):
        inspect.unwrap(harvest_all)(lm, [hook], tokens.float())
