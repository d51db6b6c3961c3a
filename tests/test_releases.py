"""Every kind of release in SAELens's directory: the same SAE as SAELens makes of the same files.

The files are small and made here, in huggingface_hub's cache under the names that releases have.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import fastsae
from fastsae.sae_lens import SAE
from parity import relative_error

D, F, B = 16, 64, 40
COMMIT = "0" * 40


class Release(NamedTuple):
    release: str
    sae_id: str
    files: Any
    """Function of the path below the repository -> {name: content}."""
    shape: dict[str, int] = {}
    """Widths, where SAELens takes those of the published SAE from a table."""
    heads: bool = False


def weights(**more):
    torch.manual_seed(0)
    made = {
        "W_enc": torch.randn(D, F),
        "b_enc": torch.randn(F),
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
    }
    return made | more


def linear(encoder, decoder, **more):
    w = weights()
    return {
        f"{encoder}.weight": w["W_enc"].t().contiguous(),
        f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"].t().contiguous(),
        f"{decoder}.bias": w["b_dec"],
    } | more


def native(hook, **changes):
    config = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "device": "cpu",
        "hook_point": hook,
        "model_name": "gpt2-small",
        "normalize_activations": "none",
        **changes,
    }
    return lambda path: {
        f"{path}/cfg.json": config,
        f"{path}/sae_weights.safetensors": weights(),
        f"{path}/sparsity.safetensors": {"sparsity": torch.linspace(-5, -1, F)},
    }


def gemma_1(path):
    return {f"{path}/params.npz": weights(threshold=torch.rand(F))}


def gemma_2(hook_in, hook_out=None, *, affine=False, stated=True):
    def files(path):
        tensors = {k.lower(): v for k, v in weights(threshold=torch.rand(F)).items()}
        if affine:
            tensors["affine_skip_connection"] = torch.randn(D, D)
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt"}
        config |= {"hf_hook_point_in": hook_in, "affine_connection": affine}
        config |= {} if hook_out is None else {"hf_hook_point_out": hook_out}
        made = {f"{path}/params.safetensors": tensors}
        return made | ({f"{path}/config.json": config} if stated else {})

    return files


def llama(path):
    config = {
        "d_model": D,
        "d_sae": F,
        "hook_point_in": "blocks.0.hook_attn_out",
        "jump_relu_threshold": 0.7,
        # What the directory states for this SAE, norm_scaling_factor = sqrt(D) / norm.
        "dataset_average_activation_norm": {"in": D**0.5 / 112.21917808219177},
    }
    return {
        f"{path}/hyperparams.json": config,
        f"{path}/checkpoints/final.safetensors": linear("encoder", "decoder"),
    }


def llama_r1(path):
    config = {"d_model": D, "expansion_factor": F // D, "hook_point_in": "blocks.0.hook_resid_post"}
    tensors = linear("encoder", "decoder", log_jumprelu_threshold=torch.randn(F))
    return {f"{path}/config.json": config, f"{path}/sae_weights.safetensors": tensors}


def dictionary(kind, **more):
    def files(path):
        w = linear("encoder", "decoder")
        tensors = {**w, "b_dec": w.pop("decoder.bias"), **more}
        del tensors["decoder.bias"]
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 12, "k": 5}
        trainer |= {"lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_12"}
        config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
        return {f"{path}/config.json": config, f"{path}/ae.pt": tensors}

    return files


def qwen(path):
    w = weights()
    return {path: {**w, "W_enc": w["W_enc"].t(), "W_dec": w["W_dec"].t()}}


def attention_of_gpt2(path):
    stem = path.removesuffix(".pt")
    config = {"act_size": D, "dict_size": F, "act_name": "blocks.0.attn.hook_z"}
    return {path: weights(), f"{stem}_cfg.json": config}


def hanna(path):
    w = weights()
    run = {"d_model": {"value": D}, "d_feature": {"value": F}, "batch_size": {"value": 512}}
    return {
        path: {**w, "W_enc": w["W_enc"].t().contiguous()},
        "wandb-config.yaml": run,
        "config.yaml": {"model_name": "Qwen/Qwen3-4B"},
    }


def cross_layer(path):
    w = weights()
    config = {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid"}
    return {
        f"W_enc_{path}.safetensors": {
            f"W_enc_{path}": w["W_enc"].t().contiguous(),
            f"b_enc_{path}": w["b_enc"],
            f"b_dec_{path}": w["b_dec"],
        },
        f"W_dec_{path}.safetensors": {f"W_dec_{path}": torch.randn(F, 3, D)},
        "config.yaml": config | {"feature_output_hook": "hook_mlp_out"},
    }


def temporal(path):
    made = fastsae.TemporalSAE(
        fastsae.TemporalConfig(d_in=D, d_sae=F, n_heads=2, bottleneck_factor=8, tied_weights=False)
    )
    tensors = {k: torch.randn(v.shape) for k, v in made.state_dict().items()}
    w = {new: tensors.pop(old) for old, new in (("W_dec", "D"), ("W_enc", "E"), ("b_dec", "b"))}
    settings = {
        "exp_factor": F // D,
        "n_heads": 2,
        "n_attn_layers": 1,
        "bottleneck_factor": 8,
        "sae_diff_type": "topk",
        "kval_topk": 6,
        "tied_weights": False,
        "scaling_factor": 0.02,
    }
    config = {"llm": {"dimin": D}, "sae": settings, "data": {"dtype": "float32"}}
    return {f"{path}/conf.yaml": config, f"{path}/latest_ckpt.safetensors": tensors | w}


WIDTHS = {"d_in": D, "d_sae": F}
LAYER = "model.layers.9."
GEMMA_2_IN, GEMMA_2_OUT = (f"{LAYER}{s}_feedforward_layernorm.output" for s in ("pre", "post"))
GATED = {"gate_bias": torch.ones(F), "mag_bias": torch.zeros(F), "r_mag": torch.full((F,), 0.1)}
RELEASES = {
    "gpt2": Release(
        "gpt2-small-res-jb", "blocks.8.hook_resid_pre", native("blocks.8.hook_resid_pre")
    ),
    "scale": Release(
        "gemma-2b-res-jb",
        "blocks.6.hook_resid_post",
        native("blocks.6.hook_resid_post", normalize_activations="expected_average_only_in"),
    ),
    "overridden": Release(
        "mistral-7b-res-wg", "blocks.8.hook_resid_pre", native("blocks.8.hook_resid_pre")
    ),
    "gemma-1": Release(
        "gemma-scope-2b-pt-res-canonical", "layer_3/width_16k/canonical", gemma_1, WIDTHS
    ),
    "gemma-1-mlp": Release(
        "gemma-scope-9b-pt-mlp-canonical", "layer_3/width_16k/canonical", gemma_1, WIDTHS
    ),
    "gemma-1-attention": Release(
        "gemma-scope-2b-pt-att-canonical", "layer_3/width_16k/canonical", gemma_1, WIDTHS, True
    ),
    "gemma-1-embedding": Release(
        "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", gemma_1, WIDTHS
    ),
    "gemma-1-transcoder": Release(
        "gemma-scope-2b-pt-transcoders",
        "layer_0/width_16k/average_l0_76",
        gemma_1,
        {**WIDTHS, "d_out": D},
    ),
    "gemma-2": Release(
        "gemma-scope-2-4b-pt-res", "layer_9_width_16k_l0_medium", gemma_2(f"{LAYER}output")
    ),
    "gemma-2-unstated": Release(
        "gemma-scope-2-4b-pt-res",
        "layer_9_width_16k_l0_medium",
        gemma_2(f"{LAYER}output", stated=False),
    ),
    "gemma-2-affine": Release(
        "gemma-scope-2-4b-pt-transcoders",
        "transcoder/layer_9_width_16k_l0_big_affine",
        gemma_2(GEMMA_2_IN, GEMMA_2_OUT, affine=True),
    ),
    "llama-scope": Release("llama_scope_lxa_32x", "l0a_32x", llama),
    "llama-scope-r1": Release("llama_scope_r1_distill", "l0r_800m_slimpajama", llama_r1),
    "topk-of-dictionary-learning": Release(
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109",
        "blocks.12.hook_resid_post__trainer_0",
        dictionary("AutoEncoderTopK", k=torch.tensor(5, dtype=torch.int32)),
    ),
    "qwen-scope": Release("qwen-scope-3-1.7b-base-w32k-l50", "layer0", qwen, WIDTHS),
    "goodfire": Release(
        "goodfire-llama-3.3-70b-instruct",
        "layer_50",
        lambda path: {path: linear("encoder_linear", "decoder_linear")},
        WIDTHS,
    ),
    "deepseek": Release(
        "deepseek-r1-distill-llama-8b-qresearch",
        "blocks.19.hook_resid_post",
        lambda path: {path: linear("encoder", "decoder")},
        WIDTHS,
    ),
    "attention-of-gpt2": Release(
        "gpt2-small-hook-z-kk", "blocks.0.hook_z", attention_of_gpt2, {}, True
    ),
    "hanna": Release("mwhanna-qwen3-4b-transcoders", "layer_0", hanna),
    "cross-layer": Release("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_0", cross_layer),
    "temporal": Release("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", temporal),
}
SAID_BY_BOTH = (
    "hook_name",
    "hook_name_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "neuronpedia_id",
    "model_from_pretrained_kwargs",
)


@pytest.fixture
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sae_lens", reason="the `peers` extra is absent")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def publish(cache: Path, repo: str, files: dict[str, Any]) -> Path:
    """Files of a repository in the cache, as a download leaves them."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(content))
        elif path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(content))
        elif path.suffix == ".npz":
            arrays: Any = {k: v.numpy() for k, v in content.items()}
            np.savez(path, **arrays)
        elif path.suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in content.items()}, path)
        else:
            torch.save(content, path)
    return folder / "snapshots" / COMMIT


def theirs_of(peer, case, root, monkeypatch):
    """SAELens's SAE; widths that it takes from a table or from the network are those of here."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes import sae as module

    def shapes(repo, name):
        with safe_open(root / name, "pt") as file:
            return {key: list(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118

    said = module.get_config_overrides
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    monkeypatch.setattr(module, "get_config_overrides", lambda *a: {**said(*a), **case.shape})
    return peer.SAE.from_pretrained_with_cfg_and_sparsity(case.release, case.sae_id)


@pytest.mark.filterwarnings("ignore")  # the cross-layer one warns, and SAELens of many things
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_what_sae_lens_makes_of_it(name, peer, cache, monkeypatch):
    from fastsae.interop.releases import find

    case = RELEASES[name]
    entry = find(case.release, case.sae_id)
    root = publish(cache, entry.repo, case.files(entry.path))
    theirs, _, sparsity = theirs_of(peer, case, root, monkeypatch)
    ours, config, found = SAE.from_pretrained(case.release, case.sae_id)
    assert ours.cfg.architecture == theirs.cfg.architecture() == config["architecture"]
    x = torch.randn(2, B, D) * 2 + 0.5
    z = x.unflatten(-1, (2, -1)) if case.heads else x
    with torch.no_grad():
        acts = theirs.encode(z)
        assert acts.any()
        assert relative_error(ours.encode(z), acts) <= 1e-5
        assert relative_error(ours(z), theirs(z)) <= 1e-5
    assert (found is None) == (sparsity is None)
    assert found is None or torch.equal(found, sparsity)
    for key in SAID_BY_BOTH:
        assert ours.cfg.metadata.get(key) == getattr(theirs.cfg.metadata, key), key
    wanted = str(theirs.cfg.metadata.model_name)
    assert str(ours.cfg.metadata.model_name).endswith(wanted.removeprefix("google/"))


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "GatedAutoEncoder"])
def test_dictionaries_by_repository_and_folder(kind, cache):
    more: Any = GATED if kind == "GatedAutoEncoder" else {"threshold": torch.tensor(0.5)}
    files = dictionary(kind, **more)("resid_post_layer_12/trainer_0")
    if kind == "GatedAutoEncoder":
        tensors = files["resid_post_layer_12/trainer_0/ae.pt"]
        tensors["decoder_bias"] = tensors.pop("b_dec")
    publish(cache, "somebody/saes", files)
    sae = SAE.from_pretrained("somebody/saes", "resid_post_layer_12/trainer_0")
    assert sae.cfg.metadata.hook_name == "blocks.12.hook_resid_post"
    assert sae(torch.randn(3, D)).shape == (3, D)


def test_arguments_of_loading(cache):
    publish(cache, "somebody/saes", native("blocks.1.hook_resid_pre")("layer_1"))
    plain = SAE.from_pretrained("somebody/saes", "layer_1")
    x = torch.randn(5, D)
    folded = SAE.from_pretrained("somebody/saes", "layer_1", fold_W_dec_norm=True)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(F))
    assert relative_error(folded(x).detach(), plain(x).detach()) < 1e-5
    half = SAE.from_pretrained("somebody/saes", "layer_1", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.cfg.dtype == "bfloat16"
    assert half.W_enc.stride() == (1, D)
    with pytest.raises(ValueError, match="dtype must name a floating torch dtype, got 'float33'"):
        SAE.from_pretrained("somebody/saes", "layer_1", dtype="float33")
    assert SAE.from_pretrained("somebody/saes", "layer_1")[2] is not None

    def converter(repo, folder, device, force_download, overrides):
        config = {"architecture": "standard", "d_in": D, "d_sae": F, "hook_name": folder}
        return config | {"sae_lens_version": "5.0.0", **overrides}, weights(), None

    read = SAE.from_pretrained("any/where", "blocks.2.hook_resid_pre", converter=converter)
    assert read.cfg.metadata.hook_name == "blocks.2.hook_resid_pre"
    assert relative_error(read(x).detach(), plain(x).detach()) < 1e-6


def test_an_sae_of_scaled_rows_whose_scale_nobody_states_says_so(cache):
    files = native("blocks.1.hook_resid_pre", normalize_activations="expected_average_only_in")
    publish(cache, "somebody/saes", files("layer_1"))
    with pytest.warns(UserWarning, match="was trained on rows of another scale, which is not stat"):
        SAE.from_pretrained("somebody/saes", "layer_1")


def test_a_copy_that_lacks_the_sae_is_an_error_that_names_it(cache):
    publish(cache, "somebody/saes", native("blocks.1.hook_resid_pre")("layer_1"))
    with pytest.raises(OSError, match="release somebody/saes must have layer_2, got a copy of"):
        SAE.from_pretrained("somebody/saes", "layer_2")


def test_links_to_neuronpedia(tmp_path):
    from fastsae.sae_lens import get_neuronpedia_quick_list, hooked

    shape: Any = {"d_in": D, "d_sae": F, "k": 4}
    metadata = {"neuronpedia_id": "gpt2-small/8-res-jb"}
    sae: Any = hooked(fastsae.TopKSAE(fastsae.TopKConfig(**shape, metadata=metadata)))
    assert sae.neuronpedia_url(7) == "https://www.neuronpedia.org/gpt2-small/8-res-jb/7"
    link = get_neuronpedia_quick_list(sae, [7, 8], name="two of them")
    start, _, query = link.partition("features=")
    assert start == "https://www.neuronpedia.org/quick-list/?name=two%20of%20them&"
    from urllib.parse import unquote

    assert json.loads(unquote(query)) == [
        {"modelId": "gpt2-small", "layer": "8-res-jb", "index": i} for i in ("7", "8")
    ]
    with pytest.raises(ValueError, match=r"latent must be in \[0, F\) with F = 64, got 64"):
        sae.neuronpedia_url(64)
    unknown: Any = hooked(fastsae.TopKSAE(fastsae.TopKConfig(**shape)))
    with pytest.raises(ValueError, match="sae must have a neuronpedia_id .* got None"):
        unknown.neuronpedia_url(7)
