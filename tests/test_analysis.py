"""Steering and attribution on plain, hooked and bridged models."""

import warnings
from typing import Any

import pytest
import torch

from fastsae import TopKConfig, TopKSAE
from fastsae.analysis.attribute import logit_attribution, top_latents, unembedding
from fastsae.analysis.steer import steer
from fastsae.data import capture, resolve_hook
from parity import relative_error
from tiny_models import save_tiny_llama, tiny_llama

D, F, HOOK = 16, 48, "blocks.1.hook_resid_post"
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae():
    torch.manual_seed(0)
    made = TopKSAE(TopKConfig(d_in=D, d_sae=F, k=5, metadata={"hook_name": HOOK}))
    with torch.no_grad():
        for value in made.state_dict().values():
            value.copy_(torch.randn(value.shape))
    return made


def models(tmp_path) -> Any:
    """The same kind of model in every form, each as a function tokens -> logits."""
    from transformer_lens.model_bridge import TransformerBridge

    from fastsae.data import load_language_model

    lm = tiny_llama(num_hidden_layers=3)
    yield lm, lambda tokens: lm.model(tokens).logits
    yield lm.model, lambda tokens: lm.model(tokens).logits
    loaded = load_language_model(save_tiny_llama(tmp_path, num_hidden_layers=3))
    bridge = TransformerBridge.boot_transformers(
        str(loaded.model.config.name_or_path), hf_model=loaded.model, tokenizer=loaded.tokenizer
    )
    yield bridge, bridge
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return  # transformer-lens 4 has neither
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", d_mlp=32
    )
    hooked = HookedTransformer(cfg).eval()
    yield hooked, hooked


def test_steering_changes_the_logits_and_leaves_no_trace(tmp_path, sae):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for model, logits in models(tmp_path):
            clean = logits(TOKENS)
            with steer(model, sae, latent=7, strength=20.0):
                steered = logits(TOKENS)
            with steer(model, sae, latent=7, strength=0.0):
                unmoved = logits(TOKENS)
            assert (steered - clean).abs().max() > 1e-2, type(model)
            assert torch.equal(unmoved, clean) and torch.equal(logits(TOKENS), clean)


def test_steering_adds_a_vector_of_the_length_asked_for(sae):
    lm = tiny_llama(num_hidden_layers=3)
    hook = resolve_hook(lm, HOOK)
    later = resolve_hook(lm, "blocks.2.hook_resid_pre")
    clean = capture(lm, hook, TOKENS)
    with steer(lm, sae, latent=3, strength=2.5):
        moved = capture(lm, later, TOKENS)
    row = sae.W_dec[3].detach()
    assert relative_error(moved, clean + 2.5 * row / row.norm()) < 1e-5


def test_generation_is_steered(sae):
    lm: Any = tiny_llama(num_hidden_layers=3)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = lm.model.generate(TOKENS[:1], **options)
    with steer(lm.model, sae, latent=7, strength=200.0):
        steered = lm.model.generate(TOKENS[:1], **options)
    assert not torch.equal(plain, steered)


def test_attribution_is_the_dense_recipe(sae):
    lm = tiny_llama(num_hidden_layers=3)
    x = capture(lm, resolve_hook(lm, HOOK), TOKENS)
    W_U = unembedding(lm)
    for minus in (None, 4):
        direction = W_U[:, 11] - (0 if minus is None else W_U[:, minus])
        acts = sae.encode(x) / sae.W_dec.norm(dim=1)
        dense = acts * (sae.W_dec @ direction)
        found = logit_attribution(sae, x, W_U, 11, minus=minus)
        assert relative_error(found.to_dense(F), dense.detach()) < 1e-5
        best = dense.sum((0, 1)).topk(10)
        assert [latent for latent, _ in top_latents(found, F)] == best.indices.tolist()
    # Contributions and the bias are the whole of what the reconstruction gives the logit.
    total = found.acts.sum(-1) + sae.b_dec @ direction
    assert relative_error(total.detach(), (sae(x) @ direction).detach()) < 1e-4


def test_bad_arguments_are_named(sae):
    lm = tiny_llama(num_hidden_layers=3)
    with (
        pytest.raises(ValueError, match=r"latent must be in \[0, F\) with F = 48, got 48"),
        steer(lm, sae, latent=48, strength=1.0),
    ):
        pass
    with (
        pytest.raises(ValueError, match="hook layer must be from 0 to 2"),
        steer(lm, sae, 0, 1.0, hook="blocks.9.hook_resid_post"),
    ):
        pass
    with pytest.raises(ValueError, match=r"token must be in \[0, V\) with V = 50, got 50"):
        logit_attribution(sae, torch.zeros(1, D), unembedding(lm), 50)
    with pytest.raises(TypeError, match="model must have an output embedding, got Linear"):
        unembedding(torch.nn.Linear(2, 2))
