"""The temporal SAE against SAELens's, run beside it, and what it refuses."""

import warnings
from typing import Any

import pytest
import torch

import fastsae
from fastsae import DataConfig, TemporalConfig, TemporalSAE, TrainConfig
from fastsae.sae_lens import hooked
from parity import relative_error

D, F, L = 12, 64, 9
SHAPE: Any = {"d_in": D, "d_sae": F, "n_heads": 2, "bottleneck_factor": 8}
CASES: dict[str, dict[str, Any]] = {
    "topk": {"kval_topk": 6},
    "every-positive": {"kval_topk": None},
    "relu": {"sae_diff_type": "relu"},
    "untied": {"kval_topk": 6, "tied_weights": False},
    "two-layers": {"kval_topk": 6, "n_attn_layers": 2},
    "uncentred": {"kval_topk": 6, "apply_b_dec_to_input": False},
    "uncentred-untied": {"kval_topk": 6, "apply_b_dec_to_input": False, "tied_weights": False},
    "scaled": {
        "kval_topk": 6,
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.02,
    },
    "layer-norm": {"kval_topk": 6, "normalize_activations": "layer_norm"},
    "rescaled": {"kval_topk": 6, "normalize_activations": "constant_norm_rescale"},
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens", reason="the `peers` extra is absent")


def pair(peer, case):
    fields = {**SHAPE, **CASES[case]}
    sae_class, config_class = peer.registry.get_sae_class("temporal")
    theirs = sae_class(config_class(**fields))
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.copy_(torch.randn(value.shape))
    ours = TemporalSAE(TemporalConfig(**fields))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_close(got, want, name):
    error = relative_error(got.detach(), want.detach())
    assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_files_are_theirs(peer, case, tmp_path):
    ours, theirs = pair(peer, case)
    x = torch.randn(3, L, D) * 4 + 1
    ours.save_model(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    with torch.no_grad():
        novel, predicted = theirs.encode_with_predictions(x)
        decoded, x_hat = theirs.decode(novel), theirs(x)
        assert novel.any() and predicted.any()
        for name in ("built", "ours", "theirs"):
            sae = ours if name == "built" else fastsae.SAE.load_from_disk(tmp_path / name)
            assert isinstance(sae, TemporalSAE)
            assert_close(sae.encode(x), novel, "encode")
            assert_close(sae.predicted_acts(x), predicted, "predicted acts")
            assert_close(sae.decode(novel), decoded, "decode")
            code = sae.encode_sparse(x)
            assert_close(code.to_dense(F).reshape(novel.shape), novel, "encode_sparse")
            assert_close(sae.decode(code).reshape(x.shape), decoded, "sparse decode")
            assert_close(sae(x), x_hat, "forward")
        back = peer.SAE.load_from_disk(tmp_path / "ours")
        assert_close(back(x), x_hat, "their reader")


@pytest.mark.parametrize("case", ["topk", "scaled"])
def test_hook_points_see_what_theirs_see(peer, case):
    ours, theirs = pair(peer, case)
    x = torch.randn(2, L, D)
    with torch.no_grad():
        clean = ours(x)
        out, cache = hooked(ours).run_with_cache(x)
        _, wanted = theirs.run_with_cache(x)
        assert_close(out, clean, "listening changes nothing")
        for name in ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_output"):
            assert_close(cache[name], wanted[name], name)


def test_a_position_knows_nothing_of_later_ones(peer):
    ours, _ = pair(peer, "topk")
    x = torch.randn(1, L, D)
    later = x.clone()
    later[:, 5:] += 1
    with torch.no_grad():
        assert_close(ours(later)[:, :5], ours(x)[:, :5], "earlier positions")
        assert relative_error(ours(later)[:, 5:], ours(x)[:, 5:]) > 1e-2


def test_what_a_temporal_sae_cannot_do_is_named():
    sae = TemporalSAE(TemporalConfig(**SHAPE))
    with pytest.raises(ValueError, match="must be one that can be trained, got 'temporal'"):
        TrainConfig(sae=sae.cfg, data=DataConfig(total_tokens=100, batch_size=10))
    with pytest.raises(ValueError, match="must be one that can be trained, got 'temporal'"):
        sae.loss(torch.randn(4, D))
    eye = torch.eye(D, dtype=torch.float64)
    for fold in (
        sae.fold_W_dec_norm,
        lambda: sae.fold_activation_scale(2.0),
        lambda: sae.fold_activation_whitening(eye[0], eye, eye),
    ):
        with pytest.raises(ValueError, match="must not be called on a temporal SAE"):
            fold()
    with pytest.raises(ValueError, match=r"d_sae must be a multiple of .* = 16, got 70"):
        TemporalConfig(**{**SHAPE, "d_sae": 70})
    with pytest.raises(ValueError, match=r"kval_topk must be in \[1, d_sae\] .* got 65"):
        TemporalConfig(**SHAPE, kval_topk=65)


@pytest.mark.usefixtures("no_type_checker")
def test_rows_without_their_context_are_refused():
    from fastsae.evaluation.evaluate import evaluate

    sae = TemporalSAE(TemporalConfig(**SHAPE))
    nothing: Any = None
    with pytest.raises(ValueError, match="sae must read each row by itself to be evaluated on row"):
        evaluate(sae, nothing, nothing, nothing)
    with pytest.raises(ValueError, match=r"x must be sequences \[..., L, D\], got \[12\]"):
        sae(torch.randn(D))
