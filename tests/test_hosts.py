"""SAEs inside TransformerLens models: SAELens's calls, held to SAELens where it runs."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch

import fastsae
from fastsae import SAES
from fastsae.interop.pretrained import find
from fastsae.sae_lens import SAE, SAEHuggingFaceModel, SAETransformerBridge, hooked
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


def test_what_a_hook_does_not_implement_is_not_swallowed():
    sae = hooked(make())

    def unfinished(acts, hook):
        raise NotImplementedError("mine")

    sae.hook_sae_acts_pre.add_hook(unfinished)
    with pytest.raises(NotImplementedError, match="mine"):
        sae.encode(torch.ones(1, D))


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


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
GENERATION: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def gpt2():
    """A plain GPT-2, whose layer norm leaves room for centring."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=D, n_layer=3, n_head=2, n_inner=32
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "ln" not in name:
            value.data.normal_(mean=0.1, std=0.3)
    return model


def test_a_plain_model_carries_saes(gpt2):
    from fastsae.data import LanguageModel, capture, resolve_hook

    no_tokenizer: Any = None
    lm = LanguageModel("tiny", gpt2, no_tokenizer)
    model, sae = SAEHuggingFaceModel(gpt2), hooked(make())
    clean = gpt2(TOKENS).logits
    out, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    x = capture(lm, resolve_hook(lm, HOOK), TOKENS)
    assert_same(cache[f"{HOOK}.hook_sae_input"], x)
    assert_same(cache[f"{HOOK}.hook_sae_acts_post"], sae.encode(x))
    assert_same(cache["blocks.2.hook_resid_pre"], sae(x))
    assert_same(model.run_with_saes(TOKENS, saes=[sae]).logits, out.logits)
    assert (out.logits - clean).abs().max() > 1e-3
    same = model.run_with_saes(TOKENS, saes=[sae], use_error_term=True).logits
    assert relative_error(same, clean) <= 1e-4

    def ablate(acts, hook):
        return 0 * acts

    ablated = model.run_with_hooks_with_saes(
        TOKENS, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", ablate)]
    )
    assert (ablated.logits - out.logits).abs().max() > 1e-3
    model.add_sae(sae)
    with model.saes([hooked(make("standard"))]):
        assert list(model.acts_to_saes) == [HOOK] and model.acts_to_saes[HOOK] is not sae
    assert model.acts_to_saes[HOOK] is sae
    model.reset_saes()
    assert torch.equal(model(TOKENS).logits, clean)
    with pytest.raises(ValueError, match="hook_name in the SAE's metadata must be a hook point"):
        sae.cfg.metadata["hook_name"] = "blocks.7.hook_resid_post"
        model.add_sae(sae)


def test_a_plain_models_generation_honours_hooks(gpt2):
    model = SAEHuggingFaceModel(gpt2)
    plain = model.generate(TOKENS[:1], **GENERATION)
    push = lambda x, hook: x + 50 * torch.linspace(-1, 1, D)
    steered = model.generate(TOKENS[:1], fwd_hooks=[(HOOK, push)], **GENERATION)
    assert not torch.equal(steered, plain)
    assert torch.equal(model.generate(TOKENS[:1], **GENERATION), plain)


def test_an_sae_of_a_centred_model_reads_the_same_on_every_model(gpt2, tmp_path):
    """SAEs of TransformerLens's processed models, on that model, on the bridge and on the plain."""
    from transformer_lens.model_bridge import TransformerBridge

    sae = hooked(make("standard"))
    sae.cfg.metadata.update(CENTRED)
    point = f"{HOOK}.hook_sae_input"
    plain = SAEHuggingFaceModel(gpt2)
    out, cache = plain.run_with_cache_with_saes(TOKENS, saes=[sae])
    _, raw = plain.run_with_cache(TOKENS, names_filter=HOOK)
    x = raw[HOOK]
    assert x.mean(-1).abs().min() > 1e-3, "nothing to centre"
    assert_same(cache[point], x - x.mean(-1, keepdim=True))
    assert_same(cache["blocks.2.hook_resid_pre"], sae(cache[point]) + x.mean(-1, keepdim=True))
    gpt2.save_pretrained(tmp_path)
    import copy

    from fastsae.data import load_language_model

    tokenizer = load_language_model().tokenizer
    bridges = [
        SAETransformerBridge.boot_transformers(
            str(tmp_path), hf_model=copy.deepcopy(gpt2), tokenizer=tokenizer
        )
        for _ in range(2)
    ]
    bridges[1].enable_compatibility_mode(disable_warnings=True, fold_ln=False)
    assert isinstance(bridges[0], TransformerBridge)
    for bridge in bridges:
        logits, found = bridge.run_with_cache_with_saes(TOKENS, saes=[sae])
        assert relative_error(found[point], cache[point]) < 1e-4
        got, want = (t.log_softmax(-1) for t in (logits, out.logits))
        assert relative_error(got, want) < 1e-4  # unembeddings may be centred too


def test_special_tokens_keep_their_activation(gpt2, bridge):
    for model in (SAEHuggingFaceModel(gpt2), bridge):
        sae = hooked(make())
        excluded = [int(TOKENS[0, 0])]
        kept = torch.isin(TOKENS, torch.tensor(excluded))
        options = {"saes": [sae], "exclude_special_tokens": excluded}
        _, cache = model.run_with_cache_with_saes(TOKENS, **options)
        x, y = cache[f"{HOOK}.hook_sae_input"], cache[f"{HOOK}.hook_sae_output"]
        assert torch.equal(y[kept], x[kept]) and kept.any()
        assert (y[~kept] - x[~kept]).abs().min(-1).values.max() > 1e-4
    with pytest.raises(ValueError, match="exclude_special_tokens must be token ids where the mod"):
        SAEHuggingFaceModel(gpt2).run_with_saes(TOKENS, saes=[sae], exclude_special_tokens=True)


@needs_peer
def test_a_centred_model_is_not_what_an_uncentred_sae_was_trained_on():
    from fastsae.sae_lens import HookedSAETransformer

    model, sae = hooked_transformer(HookedSAETransformer), make()
    sae.cfg.metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_sae(sae)
    with torch.no_grad():
        model.embed.W_E -= model.embed.W_E.mean(-1, keepdim=True)
    with pytest.warns(UserWarning, match="model_from_pretrained_kwargs must be the model's, got"):
        model.add_sae(sae)
