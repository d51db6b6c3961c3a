"""SAEs inside TransformerLens models: SAELens's calls, held to SAELens where it runs."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch

import fastsae
from fastsae import SAES
from fastsae.interop.pretrained import find
from fastsae.sae_lens import SAE, SAETransformerBridge, hooked
from parity import relative_error
from tiny_models import save_tiny_llama

HOOK = "blocks.1.hook_resid_post"
D, F = 16, 48
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
HAS_PEER = importlib.util.find_spec("sae_lens") is not None
needs_peer = pytest.mark.skipif(not HAS_PEER, reason="the `peers` extra is absent")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens's own deprecations
        yield


def make(architecture="topk", **fields):
    torch.manual_seed(0)
    if architecture in ("topk", "abstopk", "batchtopk"):
        fields = {"k": 4, **fields}
    config = SAES[architecture].config_class(
        d_in=D, d_sae=F, metadata={"hook_name": HOOK, "model_name": "tiny"}, **fields
    )
    sae = SAES[architecture](config)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(
                torch.rand(value.shape) if name == "threshold" else torch.randn(value.shape)
            )
    return sae


def hooked_transformer(kind):
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(1)
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", d_mlp=32
    )
    return kind(cfg).eval()


@pytest.fixture
def bridge(tmp_path):
    from fastsae.data import load_language_model

    lm = load_language_model(save_tiny_llama(tmp_path, num_hidden_layers=3))
    return SAETransformerBridge.boot_transformers(
        str(lm.model.config.name_or_path), hf_model=lm.model, tokenizer=lm.tokenizer
    )


def assert_same(got, want, name=""):
    assert relative_error(got.detach(), want.detach()) <= 1e-5, name


@needs_peer
@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_logits_and_cache_are_sae_lens(architecture, error_term, tmp_path):
    import sae_lens

    from fastsae.sae_lens import HookedSAETransformer

    make(architecture).save_model(tmp_path)
    ours, theirs = SAE.load_from_disk(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    here = hooked_transformer(HookedSAETransformer)
    there = hooked_transformer(sae_lens.HookedSAETransformer)
    there.load_state_dict(here.state_dict())
    options = {"use_error_term": error_term}
    with torch.no_grad():
        want, wanted = there.run_with_cache_with_saes(TOKENS, saes=[theirs], **options)
        got, cache = here.run_with_cache_with_saes(TOKENS, saes=[ours], **options)
        assert_same(here.run_with_saes(TOKENS, saes=[ours], **options), want, "without listening")
        clean = here(TOKENS)
    assert_same(got, want, "logits")
    if error_term:
        assert_same(got, clean, "the error term gives the model back")
    points = [name for name in wanted if name.startswith(f"{HOOK}.")]
    assert len(points) >= 5
    for name in points:
        if not name.endswith("hook_sae_output"):
            assert_same(cache[name], wanted[name], name)
    assert here.acts_to_saes == {}


@needs_peer
def test_a_hook_on_acts_changes_the_logits_as_in_sae_lens(tmp_path):
    import sae_lens

    from fastsae.sae_lens import HookedSAETransformer

    make().save_model(tmp_path)
    ours, theirs = SAE.load_from_disk(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    here = hooked_transformer(HookedSAETransformer)
    there = hooked_transformer(sae_lens.HookedSAETransformer)
    there.load_state_dict(here.state_dict())

    def ablate(acts, hook):
        acts[..., :24] = 0
        return acts

    for point in ("hook_sae_acts_post", "hook_sae_acts_pre"):
        hooks: Any = [(f"{HOOK}.{point}", ablate)]
        with torch.no_grad():
            want = there.run_with_hooks_with_saes(TOKENS, saes=[theirs], fwd_hooks=hooks)
            got = here.run_with_hooks_with_saes(TOKENS, saes=[ours], fwd_hooks=hooks)
            plain = here.run_with_saes(TOKENS, saes=[ours])
        assert_same(got, want)
        assert (got - plain).abs().max() > 1e-3


def test_the_bridge_carries_saes(bridge):
    sae = hooked(make())
    with torch.no_grad():
        clean = bridge(TOKENS)
        spliced, cache = bridge.run_with_cache_with_saes(TOKENS, saes=[sae])
        again = bridge.run_with_saes(TOKENS, saes=[sae])
        same = bridge.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    assert (spliced - clean).abs().max() > 1e-3
    assert_same(again, spliced)
    assert relative_error(same, clean) <= 1e-4  # x_hat + (x - x_hat), with x_hat far from x
    x = cache[f"{HOOK}.hook_sae_input"]
    assert_same(cache[f"{HOOK}.hook_sae_acts_post"], sae.encode(x))
    assert_same(bridge(TOKENS), clean)


def test_the_context_puts_back_what_was_there(bridge):
    first, second = hooked(make()), hooked(make("standard"))
    bridge.add_sae(first)
    with bridge.saes([second]):
        assert bridge.acts_to_saes == {HOOK: second}
    assert bridge.acts_to_saes == {HOOK: first}
    bridge.reset_saes()
    assert bridge.acts_to_saes == {}


def test_generate_honours_hooks(bridge):
    """TransformerBridge's own takes fwd_hooks and ignores them."""
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "return_type": "tokens"}
    tokens = TOKENS[:1]
    plain = bridge.generate(tokens, **options)
    calls = []

    def push(x, hook):
        calls.append(x.shape)
        return x + 50 * torch.linspace(-1, 1, D)

    steered = bridge.generate(tokens, fwd_hooks=[(HOOK, push)], **options)
    assert calls and not torch.equal(steered, plain)
    assert torch.equal(bridge.generate(tokens, **options), plain)
    with pytest.raises(ValueError, match="hook must be a hook point of the model, got 'nowhere'"):
        bridge.generate(tokens, fwd_hooks=[("nowhere", push)], **options)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "gated", "matching_pursuit"])
def test_listening_changes_nothing(architecture):
    sae = hooked(make(architecture))
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        out, cache = sae.run_with_cache(x)
        assert_same(out, sae(x))
        assert_same(cache["hook_sae_acts_post"], sae.encode(x))
    assert set(sae.state_dict()) == set(make(architecture).state_dict())
    with pytest.raises(ValueError, match="hook must be one of"):
        sae.run_with_hooks(x, [("hook_sae", print)])


def test_an_sae_without_a_hook_is_refused(bridge):
    sae = fastsae.TopKSAE(fastsae.TopKConfig(d_in=D, d_sae=F, k=3))
    with pytest.raises(ValueError, match="hook_name in the SAE's metadata must be a hook point"):
        bridge.add_sae(sae)


def test_a_release_unpacks_as_it_used_to(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "release" / "layer_1"
    make().save_model(folder)
    sparsity = torch.linspace(-5, -1, F)
    save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    sae = SAE.from_pretrained(str(tmp_path / "release"), "layer_1")
    again, config, found = sae
    assert again is sae and isinstance(sae, fastsae.TopKSAE)
    assert config["d_sae"] == F and torch.equal(found, sparsity)
    x = torch.randn(3, D)
    assert_same(sae(x), fastsae.SAE.load_from_disk(folder)(x))
    assert (
        SAE.from_pretrained_with_cfg_and_sparsity(str(tmp_path / "release"), "layer_1")[2]
        is not None
    )


@needs_peer
def test_the_directory_names_near_matches():
    entry = find("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert entry.repo == "jbloom/GPT2-Small-SAEs-Reformatted"
    assert entry.neuronpedia_id == "gpt2-small/8-res-jb"
    with pytest.raises(ValueError, match=r"got 'gpt2-small-resjb'; nearest: \['gpt2-small-res-jb'"):
        find("gpt2-small-resjb", "x")
    with pytest.raises(ValueError, match=r"sae_id must be one of .* nearest: \['blocks\."):
        find("gpt2-small-res-jb", "blocks.8.hook_resid")


@needs_peer
def test_without_the_hub_a_release_says_how_to_go_on():
    with pytest.raises(OSError, match="with a local copy pass its folder as release"):
        SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
