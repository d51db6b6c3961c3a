"""Loss recovered, against passes through the model written out in the test."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae.data import (
    LanguageModel,
    RowFilter,
    Text,
    capture,
    harvest,
    load_language_model,
    resid_hook_name,
    resolve_hook,
    splice,
    tokenize,
)
from fastsae.evaluation import loss_recovered, losses_recovered
from tiny_models import tiny_llama

TOKENS = torch.randint(50, (5, 12), generator=torch.Generator().manual_seed(0))
PROSE = (
    "A glacier is a body of dense ice that moves under its own weight. It forms where more snow "
    "falls than melts over many years, often centuries, and it deforms as it flows downhill."
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama(initializer_range=0.5)


@pytest.fixture(scope="module")
def hook(lm: LanguageModel):
    return resolve_hook(lm, resid_hook_name(0))


@pytest.fixture(scope="module")
def row_filter(lm: LanguageModel, hook) -> RowFilter:
    """Sets aside the first position and the tenth of the other rows with the largest norm."""
    norms = capture(lm, hook, TOKENS)[:, 1:].norm(dim=-1)
    return RowFilter(skip_first=1, norm_limit=norms.quantile(0.9).item())


def shrink(x: Tensor) -> Tensor:
    return 0.5 * x


def written_out(lm: LanguageModel, hook, change, keep: Tensor) -> tuple[float, float]:
    """Cross-entropy, and divergence from the clean predictions, with rows `keep` changed."""
    x = capture(lm, hook, TOKENS)
    edited = torch.where(keep[..., None], change(x), x)
    clean = lm.model(TOKENS).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    with splice(lm, hook, lambda _: edited):
        logits = lm.model(TOKENS).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    kl = (clean.exp() * (clean - logits)).sum(-1).mean().item()
    return F.nll_loss(logits, TOKENS[:, 1:].flatten()).item(), kl


def test_losses_equal_those_written_out(lm: LanguageModel, hook, row_filter: RowFilter):
    result = loss_recovered(lm, hook, TOKENS, shrink, row_filter=row_filter, kl=True)
    trained = row_filter.keep(capture(lm, hook, TOKENS), TOKENS)
    every = torch.ones_like(trained)
    assert result.every_position is not None
    for loss, keep in ((result.trained_rows, trained), (result.every_position, every)):
        spliced = written_out(lm, hook, shrink, keep)
        zeroed = written_out(lm, hook, torch.zeros_like, keep)
        clean, _ = written_out(lm, hook, lambda x: x, keep)
        assert loss.ce_clean == pytest.approx(clean, rel=1e-6)
        assert (loss.ce_spliced, loss.kl_spliced) == pytest.approx(spliced, rel=1e-5)
        assert (loss.ce_zero_ablated, loss.kl_zero_ablated) == pytest.approx(zeroed, rel=1e-5)
        score = (zeroed[0] - spliced[0]) / (zeroed[0] - clean)
        assert loss.ce_loss_score == pytest.approx(score, rel=1e-4)
        assert loss.kl_score == pytest.approx(1 - spliced[1] / zeroed[1], rel=1e-4)
    assert result.every_position.ce_spliced != pytest.approx(result.ce_spliced, rel=1e-4)
    assert result.untouched_fraction == pytest.approx((~trained).double().mean().item())
    assert result.n_predicted == 5 * 11


def test_several_share_the_passes_that_none_of_them_changes(
    lm: LanguageModel, hook, row_filter: RowFilter
):
    mean = capture(lm, hook, TOKENS).flatten(0, 1).mean(0)
    options = {"row_filter": row_filter, "kl": True, "mean": mean}
    changes = {"half": shrink, "none": lambda x: x.clone()}
    calls = []
    handle = lm.model.register_forward_hook(lambda *_: calls.append(1))
    together = losses_recovered(lm, hook, TOKENS, changes, **options)
    handle.remove()
    # What can be skipped is tried twice; clean; zeros, means and two SAEs, twice.
    assert len(calls) == 2 + 1 + 2 * (2 + 2)
    assert together == {
        n: loss_recovered(lm, hook, TOKENS, c, **options) for n, c in changes.items()
    }
    trained = row_filter.keep(capture(lm, hook, TOKENS), TOKENS)
    ce, kl = written_out(lm, hook, lambda x: mean.expand_as(x), trained)
    loss = together["half"].trained_rows
    assert (loss.ce_mean_ablated, loss.kl_mean_ablated) == pytest.approx((ce, kl), rel=1e-5)
    assert together["none"].trained_rows.kl_spliced == pytest.approx(0, abs=1e-9)


def test_headline_is_the_trained_rows(lm: LanguageModel, hook, row_filter: RowFilter):
    result = loss_recovered(lm, hook, TOKENS, shrink, row_filter=row_filter, every_position=False)
    assert result.every_position is None
    assert (result.trained_rows.kl_spliced, result.trained_rows.kl_score) == (None, None)
    names = ("ce_clean", "ce_spliced", "ce_zero_ablated", "ce_loss_score")
    for name in names:
        assert getattr(result, name) == getattr(result.trained_rows, name)


def test_identity_recovers_all_and_zeros_nothing(lm: LanguageModel, hook, row_filter: RowFilter):
    identity = loss_recovered(lm, hook, TOKENS, lambda x: x.clone(), row_filter=row_filter)
    zeros = loss_recovered(lm, hook, TOKENS, torch.zeros_like, row_filter=row_filter)
    assert identity.ce_loss_score == 1.0
    assert zeros.ce_loss_score == 0.0
    assert identity.every_position is not None and zeros.every_position is not None
    assert (identity.every_position.ce_loss_score, zeros.every_position.ce_loss_score) == (1.0, 0.0)


def test_batches_do_not_matter(lm: LanguageModel, hook, row_filter: RowFilter):
    results = [
        loss_recovered(lm, hook, TOKENS, shrink, row_filter=row_filter, batch_contexts=n)
        for n in (1, 2, 5)
    ]
    for result in results[1:]:
        assert result.ce_spliced == pytest.approx(results[0].ce_spliced, rel=1e-6)
        assert result.untouched_fraction == results[0].untouched_fraction


def test_reconstruct_sees_only_rows_of_training(lm: LanguageModel, hook, row_filter: RowFilter):
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    loss_recovered(lm, hook, TOKENS, keep, row_filter=row_filter, every_position=False)
    x = capture(lm, hook, TOKENS)
    assert torch.equal(torch.cat(seen), x[row_filter.keep(x, TOKENS)])


def test_default_model_needs_its_residual_stream():
    lm = load_language_model()
    tokens = tokenize(Text("prose", [PROSE], "none"), lm.tokenizer, context_size=33)
    hook = resolve_hook(lm, resid_hook_name(15))
    row_filter = harvest(lm, hook, tokens).row_filter
    result = loss_recovered(lm, hook, tokens, lambda x: 0.5 * x, row_filter=row_filter)
    assert result.ce_clean < 4 < 8 < result.ce_zero_ablated
    assert result.ce_clean < result.ce_spliced
    assert 0.5 < result.ce_loss_score < 1
    assert result.untouched_fraction == pytest.approx(1 / 33)


def test_nan_in_a_reconstruction_is_not_hidden(lm: LanguageModel, hook, row_filter: RowFilter):
    result = loss_recovered(lm, hook, TOKENS, lambda x: x * math.nan, row_filter=row_filter)
    assert math.isnan(result.ce_spliced)


def test_what_the_model_itself_predicts_by_nan_counts_nowhere(hook, row_filter: RowFilter):
    lm = tiny_llama(initializer_range=0.5)
    bad = 7
    with torch.no_grad():
        poisoned: Any = lm.model.get_input_embeddings().weight
        poisoned[bad] = math.nan
    tokens = torch.where(TOKENS.eq(bad), 8, TOKENS)
    tokens[2, 5] = bad  # attention spreads it over the context
    options = {"row_filter": row_filter, "kl": True}
    found = loss_recovered(lm, hook, tokens, shrink, **options)
    others = loss_recovered(lm, hook, tokens[[0, 1, 3, 4]], shrink, **options)
    assert found.n_predicted == others.n_predicted == 4 * 11
    assert found.trained_rows == others.trained_rows
    assert found.every_position == others.every_position
    assert math.isfinite(found.ce_loss_score)


def test_reconstruction_of_another_shape_is_refused(lm: LanguageModel, hook, row_filter: RowFilter):
    with pytest.raises(ValueError, match=r"^reconstruct must return the shape \[N, D\] .* got"):
        loss_recovered(lm, hook, TOKENS, lambda x: x[:, 1:], row_filter=row_filter)


def test_context_of_one_token_is_refused(lm: LanguageModel, hook):
    with pytest.raises(ValueError, match=r"^tokens must have the shape \[n, L\] with L >= 2"):
        loss_recovered(lm, hook, TOKENS[:, :1], shrink, row_filter=RowFilter())


def test_batch_of_nothing_is_refused(lm: LanguageModel, hook):
    with pytest.raises(ValueError, match="^batch_contexts must be at least 1, got 0"):
        loss_recovered(lm, hook, TOKENS, shrink, row_filter=RowFilter(), batch_contexts=0)
