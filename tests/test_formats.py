"""Other libraries' checkpoints: read as they mean them, written as they read them."""

import importlib.util
import json
import math
import os
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsae
from fastsae import SAES
from fastsae.cli import main
from fastsae.interop.formats import detect, load_sae, save_checkpoint_as
from parity import relative_error

D, F, B = 16, 64, 50


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other libraries, at import
        yield


def make(architecture, **fields):
    """An SAE with weights that training could have left."""
    sae = SAES[architecture](SAES[architecture].config_class(d_in=D, d_sae=F, **fields))
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(
                torch.rand(value.shape) if name == "threshold" else torch.randn(value.shape)
            )
    return sae


def peer(module):
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return pytest.importorskip(module, reason="the `peers` extra is absent")


def assert_same(got, want):
    assert relative_error(got.detach(), want.detach()) <= 1e-5


def plain(weights, x, activation, centre=True):
    W_enc, b_enc, W_dec, b_dec = weights
    h = (x - b_dec if centre else x) @ W_enc + b_enc
    return activation(h) @ W_dec + b_dec


def topk(k):
    def keep(h):
        best = h.relu().topk(k)
        return torch.zeros_like(h).scatter(-1, best.indices, best.values)

    return keep


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_both_ways(tmp_path, transcode):
    sparsify = peer("sparsify")
    theirs = sparsify.SparseCoder(
        D, sparsify.SparseCoderConfig(num_latents=F, k=5, transcode=transcode), dtype=torch.float32
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    theirs.save_to_disk(tmp_path / "layers.3")
    ours = load_sae(tmp_path / "layers.3")
    assert detect(tmp_path / "layers.3") == "sparsify" and ours.cfg.architecture == "topk"
    assert ours.cfg.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert ours.cfg.metadata["hf_hook_name"] == "layers.3"
    x = torch.randn(B, D)
    assert_same(ours(x), theirs(x).sae_out)
    save_checkpoint_as(ours, tmp_path / "back", "sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "back", device="cpu")
    assert_same(again(x).sae_out, ours(x))


def test_saelens_cannot_read_sparsify_and_we_can(tmp_path):
    """It transposes W_dec, which has one latent a row already."""
    sae_lens = peer("sae_lens")
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    ours = make("topk", k=4, rescale_acts_by_decoder_norm=False)
    folder = tmp_path / "layers.3"
    save_checkpoint_as(ours, folder, "sparsify")
    with pytest.raises(RuntimeError, match="size mismatch"):
        sae_lens.SAE.load_from_disk(folder, converter=sparsify_disk_loader)
    x = torch.randn(B, D)
    assert_same(load_sae(folder)(x), ours(x))


def without_nnsight():
    """The package without its `__init__`: that imports nnsight, which patches FakeTensor."""
    name = "dictionary_learning"
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip("dictionary_learning is not installed")
    package = types.ModuleType(name)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or [])
    sys.modules[name] = package


def dictionaries():
    return importlib.import_module("dictionary_learning.dictionary")


def trainers(name):
    return importlib.import_module(f"dictionary_learning.trainers.{name}")


DICTIONARY_LEARNING = {
    "AutoEncoder": lambda: dictionaries().AutoEncoder(D, F),
    "AutoEncoderNew": lambda: dictionaries().AutoEncoderNew(D, F),
    "JumpReluAutoEncoder": lambda: dictionaries().JumpReluAutoEncoder(D, F),
    "GatedAutoEncoder": lambda: dictionaries().GatedAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: trainers("top_k").AutoEncoderTopK(D, F, 5),
    "BatchTopKSAE": lambda: trainers("batch_top_k").BatchTopKSAE(D, F, 5),
    "MatryoshkaBatchTopKSAE": lambda: trainers("matryoshka_batch_top_k").MatryoshkaBatchTopKSAE(
        D, F, 5, [16, 48]
    ),
}


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning_both_ways(tmp_path, kind):
    without_nnsight()
    theirs = DICTIONARY_LEARNING[kind]()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.1 if name == "r_mag" else 1))
        if hasattr(theirs, "threshold"):
            theirs.threshold.copy_(torch.rand(theirs.threshold.shape) + 0.5)
    source = tmp_path / "trainer_0"
    source.mkdir()
    torch.save(theirs.state_dict(), source / "ae.pt")
    config = {"trainer": {"dict_class": kind, "lm_name": "gpt2", "submodule_name": "mlp"}}
    (source / "config.json").write_text(json.dumps(config))
    ours = load_sae(source)
    assert detect(source) == "dictionary_learning" and ours.cfg.metadata["model_name"] == "gpt2"
    x = torch.randn(B, D)
    per_token = kind != "AutoEncoderTopK"
    x_hat = theirs(x) if per_token else theirs.decode(theirs.encode(x))
    assert_same(ours(x), x_hat)
    save_checkpoint_as(ours, tmp_path / "back", "dictionary_learning")
    assert_same(load_sae(tmp_path / "back")(x), x_hat)
    written = json.loads((tmp_path / "back" / "config.json").read_text())["trainer"]["dict_class"]
    reader = DICTIONARY_LEARNING[written]()
    state = torch.load(tmp_path / "back" / "ae.pt", weights_only=True)
    reader.load_state_dict(state)
    assert_same(reader.decode(reader.encode(x)), x_hat)


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_openai_both_ways(tmp_path, kind):
    state = {
        "encoder.weight": torch.randn(F, D),
        "latent_bias": torch.randn(F),
        "decoder.weight": torch.randn(D, F),
        "pre_bias": torch.randn(D),
        "activation": kind,
        "activation_state_dict": {"k": 5, "postact_fn": "ReLU"} if kind == "TopK" else {},
    }
    torch.save(state, tmp_path / "theirs.pt")
    ours = load_sae(tmp_path / "theirs.pt")
    x = torch.randn(B, D) * 3 + 1
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z, back = x, lambda z_hat: z_hat
    if kind == "TopK":
        z, back = (x - mean) / (std + 1e-5), lambda z_hat: z_hat * std + mean
    weights = (state["encoder.weight"].t(), state["latent_bias"], state["decoder.weight"].t())
    activation = topk(5) if kind == "TopK" else torch.relu
    assert_same(ours(x), back(plain((*weights, state["pre_bias"]), z, activation)))
    save_checkpoint_as(ours, tmp_path / "back.pt", "openai")
    written = torch.load(tmp_path / "back.pt", weights_only=True)
    for name, value in state.items():
        same = torch.equal(written[name], value) if torch.is_tensor(value) else None
        assert same is True or written[name] == value, name


def save_npz(path, tensors):
    arrays: Any = {name: value.numpy() for name, value in tensors.items()}
    np.savez(path, **arrays)


def gemma_tensors() -> Any:
    return {
        "W_enc": torch.randn(D, F),
        "b_enc": torch.randn(F),
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(F),
    }


def jump(threshold):
    return lambda h: h * (h > threshold)


def test_gemma_scope_1(tmp_path):
    t = gemma_tensors()
    save_npz(tmp_path / "params.npz", t)
    ours, x = load_sae(tmp_path), torch.randn(B, D)
    weights, threshold = list(t.values())[:4], t["threshold"]
    assert_same(ours(x), plain(weights, x, jump(threshold), centre=False))


@pytest.mark.parametrize("kind", ["sae", "transcoder", "affine"])
def test_gemma_scope_2(tmp_path, kind):
    t = {name.lower(): value for name, value in gemma_tensors().items()}
    skip = torch.randn(D, D)
    stored = t | ({"affine_skip_connection": skip} if kind == "affine" else {})
    save_file(stored, tmp_path / "params.safetensors")
    points = {"hf_hook_point_in": "a", "hf_hook_point_out": "a" if kind == "sae" else "b"}
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "gemma", **points}))
    ours, x = load_sae(tmp_path), torch.randn(B, D)
    weights, threshold = list(t.values())[:4], t["threshold"]
    want = plain(weights, x, jump(threshold), centre=False)
    assert_same(ours(x), want + (x @ skip if kind == "affine" else 0))
    wanted = {
        "sae": "jumprelu",
        "transcoder": "jumprelu_transcoder",
        "affine": "jumprelu_skip_transcoder",
    }
    assert (
        ours.cfg.architecture == wanted[kind] and ours.cfg.metadata["model_name"] == "google/gemma"
    )


def test_llama_scope(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    t = {
        "encoder.weight": torch.randn(F, D),
        "encoder.bias": torch.randn(F),
        "decoder.weight": torch.randn(D, F),
        "decoder.bias": torch.randn(D),
    }
    save_file(t, tmp_path / "checkpoints" / "final.safetensors")
    config = {"jump_relu_threshold": 0.7, "dataset_average_activation_norm": {"in": 9.0}}
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    ours, x = load_sae(tmp_path), torch.randn(B, D) * 2
    s = math.sqrt(D) / 9.0
    W_enc, b_enc, W_dec, b_dec = t.values()
    z_hat = plain((W_enc.t(), b_enc, W_dec.t(), b_dec), s * x, jump(0.7 * s), centre=False)
    assert_same(ours(x), z_hat / s)


OLD = {
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
    "device": "cpu",
    "hook_point": "blocks.2.hook_resid_pre",
    "model_name": "gpt2",
    "apply_b_dec_to_input": True,
    "normalize_activations": False,
}


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_saelens_before_6(tmp_path, kind):
    sae_lens = peer("sae_lens")
    sae = make(kind, **({"k": 5, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}))
    config = dict(OLD)
    if kind == "topk":
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    weights = {name: t.contiguous() for name, t in sae.state_dict().items()}
    save_file({**weights, "scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors")
    ours, x = load_sae(tmp_path), torch.randn(B, D)
    assert ours.cfg.architecture == kind
    assert ours.cfg.metadata["hook_name"] == "blocks.2.hook_resid_pre"
    assert_same(ours(x), sae(x))
    assert_same(ours(x), fastsae.SAE.load_from_disk(tmp_path)(x))
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert_same(sae_lens.SAE.load_from_disk(tmp_path)(x), ours(x))


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning", "openai"])
def test_convert_there_and_back(tmp_path, to, capsys):
    pytest.importorskip("tyro")
    fields = {"normalize_activations": "layer_norm"} if to == "openai" else {}
    sae = make("topk", k=4, rescale_acts_by_decoder_norm=False, **fields)
    sae.save_model(tmp_path / "a")
    there = tmp_path / ("b.pt" if to == "openai" else "b")
    main(["convert", str(tmp_path / "a"), str(there), "--to", to])
    main(["convert", str(there), str(tmp_path / "c")])
    assert f"{to} (topk, {D} -> {F}) -> saelens" in capsys.readouterr().out
    back = fastsae.SAE.load_from_disk(tmp_path / "c")
    for name, value in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_what_cannot_be_written_says_so(tmp_path):
    refused = {
        "sparsify": (make("standard"), "sparsify holds topk SAEs, got architecture 'standard'"),
        "openai": (make("gated"), "OpenAI's format holds standard SAEs"),
        "dictionary_learning": (make("abstopk", k=3), "holds standard, topk, jumprelu and gated"),
        "gemma_scope": (make("jumprelu"), r"to must be one of \['saelens'"),
    }
    for to, (sae, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            save_checkpoint_as(sae, tmp_path / to, to)
        assert not (tmp_path / to).exists()
    scaled = make("topk", k=3)
    with pytest.raises(ValueError, match="W_dec must have unit rows"):
        save_checkpoint_as(scaled, tmp_path / "scaled", "sparsify")
    scaled.fold_W_dec_norm()
    save_checkpoint_as(scaled, tmp_path / "scaled", "sparsify")
    x = torch.randn(B, D)
    assert_same(load_sae(tmp_path / "scaled")(x), scaled(x))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing there"):
        load_sae(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"path must be in one of the formats .*notes\.txt"):
        load_sae(tmp_path)
    t = gemma_tensors()
    del t["threshold"]
    save_npz(tmp_path / "params.npz", t)
    with pytest.raises(ValueError, match=r"params\.npz must hold .*without \['threshold'\]"):
        load_sae(tmp_path)
    whole = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"params\.npz is truncated or damaged"):
        load_sae(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("never",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Payload()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    with pytest.raises(ValueError, match=r"ae\.pt is truncated or damaged"):
        load_sae(tmp_path)
    assert not (tmp_path / "never").exists()
