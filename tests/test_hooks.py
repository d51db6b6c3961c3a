"""Hook names on four layouts of Hugging Face models; capture and splice against the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastsae.data import (
    LanguageModel,
    capture,
    d_at,
    load_language_model,
    resid_hook_name,
    resolve_hook,
    splice,
)

NO_TOKENIZER: Any = None
_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_LLAMA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "pad_token_id": 0,
}
LAYOUTS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, **_LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, **_LLAMA, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**_SIZES, intermediate_size=48),
}
TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=LAYOUTS, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


def tiny(layout: str) -> LanguageModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(LAYOUTS[layout]())
    return LanguageModel(layout, model.eval().requires_grad_(False), NO_TOKENIZER)


def read(lm: LanguageModel, name: str) -> Tensor:
    return capture(lm, resolve_hook(lm, name), TOKENS)


def test_residual_stream_is_the_models_hidden_states(lm: LanguageModel):
    states = lm.model(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(lm.n_layers):
        assert torch.equal(read(lm, f"blocks.{layer}.hook_resid_pre"), states[layer])
    for layer in range(lm.n_layers - 1):  # the last state has passed the final norm
        assert torch.equal(read(lm, resid_hook_name(layer)), states[layer + 1])


def test_residual_stream_is_the_sum_of_its_parts(lm: LanguageModel):
    pre, attention, mlp, post = (
        read(lm, f"blocks.1.hook_{part}")
        for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    torch.testing.assert_close(pre + attention + mlp, post)


@pytest.mark.parametrize(
    ("layout", "projection"),
    [
        ("llama", "model.layers.1.self_attn.o_proj"),
        ("gpt2", "transformer.h.1.attn.c_proj"),
        ("neox", "gpt_neox.layers.1.attention.dense"),
    ],
)
def test_hook_z_goes_through_the_projection(layout: str, projection: str):
    lm = tiny(layout)
    out = lm.model.get_submodule(projection)(read(lm, "blocks.1.attn.hook_z"))
    torch.testing.assert_close(out, read(lm, "blocks.1.hook_attn_out"))


@pytest.mark.parametrize(
    ("layout", "path", "name"),
    [
        ("llama", "model.layers.1", "blocks.1.hook_resid_post"),
        ("gemma2", "model.layers.2", "blocks.2.hook_resid_post"),
        ("gpt2", "transformer.h.1.mlp", "blocks.1.hook_mlp_out"),
        ("neox", "gpt_neox.layers.0.attention", "blocks.0.hook_attn_out"),
    ],
)
def test_module_path_means_its_output(layout: str, path: str, name: str):
    lm = tiny(layout)
    hook = resolve_hook(lm, path)
    assert (hook.name, hook.module_path, hook.side) == (path, path, "output")
    assert torch.equal(capture(lm, hook, TOKENS), read(lm, name))


def test_capture_runs_no_further_than_the_hook(lm: LanguageModel):
    ran: list[int] = []
    layers = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList))
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(layers)
    ]
    read(lm, "blocks.1.hook_resid_post")
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "name", ["hook_resid_pre", "hook_resid_post", "hook_mlp_out", "attn.hook_z"]
)
def test_splice_of_the_same_activation_changes_no_bit(lm: LanguageModel, name: str):
    hook = resolve_hook(lm, f"blocks.1.{name}")
    clean = lm.model(TOKENS).logits
    with splice(lm, hook, lambda x: x.clone()):
        assert torch.equal(lm.model(TOKENS).logits, clean)
    with splice(lm, hook, torch.zeros_like):
        assert not torch.allclose(lm.model(TOKENS).logits, clean)
    assert torch.equal(lm.model(TOKENS).logits, clean)


def test_splice_replaces_the_residual_stream(lm: LanguageModel):
    with splice(lm, resolve_hook(lm, resid_hook_name(0)), lambda x: 2 * x):
        doubled = read(lm, "blocks.1.hook_resid_pre")
    assert torch.equal(doubled, 2 * read(lm, resid_hook_name(0)))


@pytest.mark.parametrize(
    ("name", "width"), [("blocks.0.hook_resid_pre", 32), ("model.layers.1.mlp.up_proj", 48)]
)
def test_width(name: str, width: int):
    lm = tiny("llama")
    assert d_at(lm, resolve_hook(lm, name)) == width


def test_default_model_is_captured_exactly():
    lm = load_language_model()
    tokens = torch.randint(1000, (2, 9), generator=torch.Generator().manual_seed(0))
    states = lm.model(tokens, output_hidden_states=True).hidden_states
    hook = resolve_hook(lm, resid_hook_name(15))
    assert hook.module_path == "model.layers.15"
    assert torch.equal(capture(lm, hook, tokens), states[16])


@pytest.mark.parametrize(
    "name", ["blocks.3.hook_resid_post", "blocks.30.attn.hook_z", "model.layers.3"]
)
def test_layer_out_of_range_is_refused(name: str):
    with pytest.raises(ValueError, match="^hook layer must be from 0 to 2 in llama, got 30? "):
        resolve_hook(tiny("llama"), name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.1.hook_resid_pos", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"),
        ("model.layers.1.mpl", "model.layers.1.mlp"),
        ("block.0.hook_mlp_out", "blocks.0.hook_mlp_out"),
        ("", "blocks.0.hook_resid_pre"),
    ],
)
def test_unknown_hook_is_refused(name: str, nearest: str):
    with pytest.raises(ValueError, match="^hook must name an activation .*; nearest: .*" + nearest):
        resolve_hook(tiny("llama"), name)


def test_layer_without_that_part_is_refused():
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48
    )
    lm = LanguageModel(
        "opt", transformers.AutoModelForCausalLM.from_config(config).eval(), NO_TOKENIZER
    )
    with pytest.raises(ValueError, match="mlp_out needs a layer with .* got OPTDecoderLayer; name"):
        resolve_hook(lm, "blocks.0.hook_mlp_out")


def test_negative_layer_is_refused():
    with pytest.raises(ValueError, match="^layer must be at least 0, got -1"):
        resid_hook_name(-1)


def test_activation_of_another_shape_is_refused():
    lm = tiny("llama")
    with pytest.raises(ValueError, match=r"^hook must be an activation of shape \[n, L, D\]"):
        read(lm, "model.rotary_emb")


def test_module_that_returns_no_tensor_is_refused():
    lm = tiny("llama")
    with pytest.raises(ValueError, match="^hook must be a module whose output is a tensor, got"):
        read(lm, "model")


def test_module_that_never_runs_is_refused():
    lm = tiny("llama")
    with pytest.raises(RuntimeError, match=r"model\.layers is never run by llama"):
        read(lm, "model.layers")


def test_replacement_of_another_shape_is_refused():
    lm = tiny("llama")
    hook = resolve_hook(lm, resid_hook_name(1))
    with (
        splice(lm, hook, lambda x: x[..., :-1]),
        pytest.raises(ValueError, match="^replace must return the shape"),
    ):
        lm.model(TOKENS)
