"""Passes that go on from a hooked layer are those of the whole model."""

from __future__ import annotations

import pytest
import torch

from fastsae.data import LanguageModel, resolve_hook, splice
from fastsae.data.replay import Replay
from tiny_models import tiny_llama

TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
SKIPPED = {
    "blocks.0.hook_resid_pre": 0,
    "blocks.0.hook_resid_post": 1,
    "blocks.2.hook_resid_pre": 2,
    "blocks.2.hook_attn_out": 2,
    "blocks.2.mlp.hook_in": 2,
    "blocks.2.attn.hook_z": 2,
    "blocks.2.hook_resid_post": 3,
    "model.layers.1.mlp": 1,
    "model.embed_tokens": 0,
}


@pytest.fixture
def lm() -> LanguageModel:
    return tiny_llama(initializer_range=0.5, num_hidden_layers=4)


def logits(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", SKIPPED)
def test_a_spliced_pass_has_the_bits_of_a_whole_one(lm, name):
    hook = resolve_hook(lm, name)
    replay = Replay(lm, hook, TOKENS[:1])
    ran = []
    for layer in lm.model.model.layers:
        layer.mlp.register_forward_hook(lambda module, *_: ran.append(module))
    with replay.recorded():
        clean = logits(lm, TOKENS)
    for change in (lambda x: 0.5 * x, torch.zeros_like):
        with splice(lm, hook, change):
            whole = logits(lm, TOKENS)
        ran.clear()
        with replay.replayed(), splice(lm, hook, change):
            assert torch.equal(logits(lm, TOKENS), whole)
        assert len(ran) == 4 - SKIPPED[name]
        assert not torch.equal(whole, clean)
    assert torch.equal(logits(lm, TOKENS), clean)  # nothing is left behind


def test_of_a_model_that_is_no_chain_nothing_is_skipped(lm):
    layers, seen = lm.model.model.layers, []
    layers[0].register_forward_hook(lambda _m, _a, output: seen.append(output))
    layers[3].register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1], *args[1:]))
    hook = resolve_hook(lm, "blocks.1.hook_resid_post")
    replay = Replay(lm, hook, TOKENS[:1])
    with splice(lm, hook, torch.zeros_like):
        whole = logits(lm, TOKENS)
    with replay.recorded():
        logits(lm, TOKENS)
    with replay.replayed(), splice(lm, hook, torch.zeros_like):
        assert torch.equal(logits(lm, TOKENS), whole)


def test_a_forward_that_somebody_had_set_is_put_back(lm):
    layer = lm.model.model.layers[0]
    own = layer.forward
    layer.forward = own
    Replay(lm, resolve_hook(lm, "blocks.1.hook_resid_post"), TOKENS[:1])
    assert vars(layer)["forward"] is own
