"""TransformerLens's bridge gives the activations and the losses of the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from fastsae.data import (
    LanguageModel,
    RowFilter,
    Text,
    capture,
    harvest,
    load_language_model,
    resid_hook_name,
    resolve_hook,
    tokenize,
)
from fastsae.evaluation import loss_recovered
from fastsae.interop.transformer_lens import from_bridge
from tiny_models import save_tiny_llama

TOKENS = torch.randint(1000, (6, 12), generator=torch.Generator().manual_seed(0))
NAMES = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"]
PROSE = "The tide came in over the flats and the boats that had lain on their sides rose again."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def plain(folder: Path) -> LanguageModel:
    return load_language_model(folder)


@pytest.fixture(scope="module")
def bridge(folder: Path) -> Any:
    return boot(folder)


def boot(folder: str | Path | None) -> Any:
    """As a user would, from a model of its own, since a bridge takes the model apart."""
    lm = load_language_model(folder)
    return TransformerBridge.boot_transformers(
        str(lm.model.config.name_or_path), hf_model=lm.model, tokenizer=lm.tokenizer
    )


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_the_plain_models_and_the_bridges_own(plain, bridge, name: str):
    name = f"blocks.1.{name}"
    lm = from_bridge(bridge)
    found = capture(lm, resolve_hook(lm, name), TOKENS)
    torch.testing.assert_close(found, capture(plain, resolve_hook(plain, name), TOKENS))
    _, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(found, cache[name].reshape(found.shape))


def test_rows_and_losses_are_the_plain_models(plain, bridge):
    found = []
    for lm in (from_bridge(bridge), plain):
        hook = resolve_hook(lm, resid_hook_name(1))
        activations = harvest(lm, hook, TOKENS)
        losses = loss_recovered(
            lm, hook, TOKENS, lambda x: 0.5 * x, row_filter=activations.row_filter, kl=True
        )
        found.append((activations, losses))
    (ours, our_losses), (theirs, their_losses) = found
    torch.testing.assert_close(ours.rows, theirs.rows)
    assert torch.equal(ours.position_of, theirs.position_of)
    for columns in ("trained_rows", "every_position"):
        made, expected = (
            {name: value for name, value in vars(getattr(losses, columns)).items() if value}
            for losses in (our_losses, their_losses)
        )
        assert made == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert our_losses.ce_clean != our_losses.ce_spliced


def test_the_bridge_is_as_it_was(plain, bridge):
    before = bridge(TOKENS)
    lm = from_bridge(bridge)
    assert (lm.d_model, lm.n_layers) == (plain.d_model, plain.n_layers)
    hook = resolve_hook(lm, resid_hook_name(0))
    loss_recovered(lm, hook, TOKENS, torch.zeros_like, row_filter=RowFilter())
    assert torch.equal(bridge(TOKENS), before)


def test_a_hook_on_the_bridge_acts_on_the_model(bridge):
    lm = from_bridge(bridge)
    later = resolve_hook(lm, resid_hook_name(1))
    clean = capture(lm, later, TOKENS)
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: 0 * x)]):
        assert not torch.allclose(capture(lm, later, TOKENS), clean)
    assert torch.equal(capture(lm, later, TOKENS), clean)


def test_a_name_that_the_bridge_lacks_is_refused(bridge):
    lm = from_bridge(bridge)
    with pytest.raises(ValueError, match=r"nearest: .*blocks.1.hook_resid_post"):
        resolve_hook(lm, "blocks.1.hook_resid_pst")
    with pytest.raises(ValueError, match="^hook layer must be from 0 to 2 in"):
        resolve_hook(lm, "blocks.3.hook_resid_post")


def test_a_bridge_in_training_mode_is_refused(bridge):
    bridge.train()
    try:
        with pytest.raises(ValueError, match="^bridge must be in eval mode, got training mode"):
            from_bridge(bridge)
    finally:
        bridge.eval()


def test_another_kind_of_model_is_refused(plain):
    with pytest.raises(TypeError, match="^bridge must be a TransformerBridge, got LlamaForCausal"):
        from_bridge(plain.model)


@pytest.mark.slow
def test_the_default_model_through_a_bridge():
    plain, lm = load_language_model(), from_bridge(boot(None))
    tokens = tokenize(Text("prose", [PROSE * 20], "none"), plain.tokenizer, context_size=32)
    rows = [harvest(m, resolve_hook(m, resid_hook_name(15)), tokens).rows for m in (lm, plain)]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)
