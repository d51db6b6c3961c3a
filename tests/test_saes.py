"""TopK and standard SAEs, held to a dense forward and a dense loss written here.

The other variants are held to SAELens's dense ones in test_variants_parity.py.
"""

import copy
import math
from typing import Any

import pytest
import torch

from fastsae import (
    SAE,
    SAES,
    JumpReLUConfig,
    JumpReLUSAE,
    StandardConfig,
    StandardSAE,
    TopKConfig,
    TopKSAE,
)
from parity import relative_error

D, F, K = 12, 40, 5
CASES = {
    "topk": ("topk", {"k": K}),
    "topk-unscaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "topk-uncentred": ("topk", {"k": K, "apply_b_dec_to_input": False}),
    "standard": ("standard", {"l1_coefficient": 0.3}),
    "standard-uncentred": ("standard", {"l1_coefficient": 0.3, "apply_b_dec_to_input": False}),
    "standard-p2": ("standard", {"l1_coefficient": 0.3, "lp_norm": 2.0}),
}
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def build(case, **changes) -> SAE:
    """An SAE with norms, biases and an encoder that training could have left."""
    architecture, fields = CASES[case]
    sae_class = SAES[architecture]
    values = {"d_in": D, "d_sae": F, "dtype": "float64", **fields, **changes}
    sae = sae_class(sae_class.config_class(**values))
    with torch.no_grad():
        sae.W_enc.add_(torch.randn(sae.W_enc.shape) * 0.2)
        sae.W_dec.mul_(torch.rand(sae.cfg.d_sae, 1) * 4 + 0.5)
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    return sae


def build_like(sae, **changes) -> SAE:
    """The same weights under another configuration."""
    cfg = type(sae.cfg)(**{**vars(sae.cfg), **changes})
    other = type(sae)(cfg)
    other.load_state_dict(sae.state_dict())
    return other


def error(got, want):
    return relative_error(got.detach(), want.detach())


@pytest.fixture(params=CASES)
def sae(request):
    torch.manual_seed(0)
    return build(request.param)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 7, D, dtype=torch.float64) + 1


def norms(sae):
    scaled = isinstance(sae, TopKSAE) and sae.cfg.rescale_acts_by_decoder_norm
    return sae.W_dec.norm(dim=1) if scaled else torch.ones(F, dtype=sae.dtype)


def pre_acts(sae, x):
    centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    return (centred @ sae.W_enc + sae.b_enc) * norms(sae)


def dense_acts(sae, x):
    acts = pre_acts(sae, x).relu()
    if isinstance(sae, TopKSAE):
        smallest = acts.topk(K).values[..., -1:]
        acts = acts * (acts >= smallest)
    return acts


def dense_decode(sae, acts):
    return (acts / norms(sae)) @ sae.W_dec + sae.b_dec


def dense_terms(sae, x, dead, step):
    acts = dense_acts(sae, x)
    x_hat = dense_decode(sae, acts)
    terms = {"mse": (x_hat - x).square().sum(-1).mean()}
    if isinstance(sae, StandardSAE):
        weighted = acts * sae.W_dec.norm(dim=1)
        p, warm_up = sae.cfg.lp_norm, sae.cfg.l1_warm_up_steps
        coefficient = sae.cfg.l1_coefficient * min(1.0, step / warm_up if warm_up else 1.0)
        terms["l1"] = coefficient * weighted.pow(p).sum(-1).pow(1 / p).mean()
    elif dead is None:
        terms["auxk"] = torch.zeros_like(terms["mse"])
    else:
        n_dead, half = int(dead.sum()), D // 2
        h = pre_acts(sae, x).masked_fill(~dead, -torch.inf)
        best = h.topk(min(half, n_dead))
        acts = torch.zeros_like(h).scatter(-1, best.indices, best.values)
        e_hat = (acts / norms(sae)) @ sae.W_dec
        error = (e_hat - (x - x_hat).detach()).square().sum(-1).mean()
        terms["auxk"] = min(n_dead / half, 1) * error
    return terms


def gradients(sae, loss):
    parameters = [getattr(sae, name) for name in PARAMETERS]
    return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)


def test_encode_is_the_dense_formula(sae, x):
    assert error(sae.encode(x), dense_acts(sae, x)) < 1e-12


def test_encode_sparse_is_the_dense_formula(sae, x):
    code = sae.encode_sparse(x)
    assert error(code.to_dense(F).reshape(3, 7, F), dense_acts(sae, x)) < 1e-12


def test_forward_is_the_dense_formula(sae, x):
    x_hat = sae(x)
    assert x_hat.shape == x.shape
    assert error(x_hat, dense_decode(sae, dense_acts(sae, x))) < 1e-12


def test_decode_of_dense_acts_equals_decode_of_the_code(sae, x):
    of_code = sae.decode(sae.encode_sparse(x)).reshape(x.shape)
    assert error(sae.decode(sae.encode(x)), of_code) < 1e-12


def test_reference_and_eager_agree(sae, x):
    eager = sae(x)
    sae.impl = "reference"
    assert error(sae(x), eager) < 1e-12


def test_a_row_in_half_precision_comes_back_in_it(sae, x):
    half = x.bfloat16()
    assert sae(half).dtype == sae.encode(half).dtype == torch.bfloat16
    assert error(sae(half), sae(half.double())) < 2**-8


@pytest.mark.parametrize("dead_share", [None, 0.1, 0.6])
def test_loss_and_every_gradient_are_the_dense_loss(sae, x, dead_share):
    rows = x.flatten(0, 1)
    dead = None if dead_share is None else torch.rand(F) < dead_share
    loss = sae.loss(rows, dead, step=3)
    expected = dense_terms(sae, rows, dead, step=3)
    assert loss.terms.keys() == expected.keys()
    for name, term in loss.terms.items():
        assert error(term, expected[name]) < 1e-12, name
    total = torch.stack(list(expected.values())).sum()
    assert error(loss.total, total) < 1e-12
    found = gradients(sae, loss.total)
    for name, got, want in zip(PARAMETERS, found, gradients(sae, total), strict=True):
        assert error(got, want) < 1e-11, name


def test_each_term_alone_has_the_dense_gradient(sae, x):
    rows, dead = x.flatten(0, 1), torch.arange(F) % 3 == 0
    standard = isinstance(sae, StandardSAE)
    second, weight = ("l1", "l1_coefficient") if standard else ("auxk", "aux_loss_coefficient")
    without = build_like(sae, **{weight: 0.0})
    mse = gradients(without, without.loss(rows, dead).total)
    both = gradients(sae, sae.loss(rows, dead).total)
    dense = dense_terms(sae, rows, dead, step=0)
    of_mse, of_second = gradients(sae, dense["mse"]), gradients(sae, dense[second])
    for i, name in enumerate(PARAMETERS):
        assert error(mse[i], of_mse[i]) < 1e-11, f"mse, {name}"
        assert error(both[i] - mse[i], of_second[i]) < 1e-10, f"{second}, {name}"


@pytest.mark.parametrize("step, share", [(0, 0.0), (3, 0.3), (9, 0.9), (10, 1.0), (50, 1.0)])
def test_the_l1_coefficient_warms_up_linearly(step, share, x):
    sae = build("standard", l1_warm_up_steps=10)
    rows = x.flatten(0, 1)
    full = sae.loss(rows, step=10).terms["l1"]
    assert float(sae.loss(rows, step=step).terms["l1"]) == pytest.approx(share * float(full))


def test_loss_counts_the_rows_each_latent_fired_on(sae, x):
    rows = x.flatten(0, 1)
    assert sae.loss(rows).counts.tolist() == (dense_acts(sae, rows) != 0).sum(0).tolist()


def test_loss_hands_back_the_reconstruction(sae, x):
    rows = x.flatten(0, 1)
    loss = sae.loss(rows)
    assert error(loss.x_hat, sae(rows)) < 1e-12
    assert not loss.err.requires_grad and not loss.x_hat.requires_grad


def test_a_saved_sae_comes_back_bit_for_bit(sae, x, tmp_path):
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    for name in PARAMETERS:
        assert torch.equal(getattr(loaded, name), getattr(sae, name)), name
    assert torch.equal(loaded(x), sae(x))
    version = loaded.cfg.metadata.pop("sae_lens_version")
    assert loaded.cfg == sae.cfg and version


def row_major(sae):
    return {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}


@pytest.mark.parametrize("how", ["constructed", "saved", "copied", "cast", "state dict"])
def test_one_latent_of_W_enc_stays_contiguous(sae, how, tmp_path):
    if how == "saved":
        sae.save_model(tmp_path)
        sae = SAE.load_from_disk(tmp_path)
    elif how == "copied":
        sae = copy.deepcopy(sae)
    elif how == "cast":
        sae = sae.to(torch.float32)
    elif how == "state dict":
        assert sae.load_state_dict(row_major(sae)).missing_keys == []
    assert sae.W_enc.shape == (D, F) and sae.W_enc.stride() == (1, D)
    assert sae.W_dec.stride() == (D, 1)


def test_a_new_sae_has_a_tied_encoder_and_decoder_rows_of_the_norm_asked_for():
    for architecture in ("standard", "topk"):
        sae_class = SAES[architecture]
        cfg = sae_class.config_class(
            d_in=D, d_sae=F, decoder_init_norm=0.25, **CASES[architecture][1]
        )
        sae = sae_class(cfg)
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        assert torch.allclose(sae.decoder_norms(), torch.full((F,), 0.25))
        assert not sae.b_enc.any() and not sae.b_dec.any()
        sae.W_enc.data.zero_()
        assert sae.W_dec.any(), "encoder and decoder share memory"


@pytest.mark.parametrize("case", [c for c in CASES if c != "topk-unscaled"])
def test_folding_decoder_norms_keeps_the_function(case, x):
    sae = build(case)
    x_hat, weighted = sae(x), sae.encode(x) * (sae.W_dec.norm(dim=1) / norms(sae))
    sae.fold_W_dec_norm()
    assert torch.allclose(sae.decoder_norms(), torch.ones(F, dtype=torch.float64))
    assert error(sae(x), x_hat) < 1e-12
    assert error(sae.encode(x), weighted) < 1e-12


def test_folding_decoder_norms_into_unscaled_topk_is_refused():
    sae = build("topk-unscaled")
    before = sae.W_dec.clone()
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm must be True to fold"):
        sae.fold_W_dec_norm()
    assert torch.equal(sae.W_dec, before)


def test_folding_the_activation_scale_keeps_the_function(sae, x):
    expected = sae(x * 7.5) / 7.5
    sae.fold_activation_scale(7.5)
    assert error(sae(x), expected) < 1e-12


def test_folding_the_activation_scale_leaves_nothing_to_the_reader():
    sae = build("topk", normalize_activations="expected_average_only_in")
    sae.fold_activation_scale(2.0)
    assert sae.cfg.normalize_activations == "none"


def test_hook_z_flattens_heads_and_restores_them(sae, x):
    heads = build_like(sae, reshape_activations="hook_z")
    z = x.unflatten(-1, (4, 3))
    assert error(heads.encode(z), sae.encode(x)) < 1e-12
    assert error(heads(z), sae(x).unflatten(-1, (4, 3))) < 1e-12
    assert error(heads.decode(heads.encode(z)), heads(z)) < 1e-12


def test_constant_norm_rescale_scales_each_row_to_the_root_of_d_in(sae, x):
    rescaling = build_like(sae, normalize_activations="constant_norm_rescale")
    factor = math.sqrt(D) / x.norm(dim=-1, keepdim=True)
    assert error(rescaling.encode(x), sae.encode(x * factor)) < 1e-12
    assert error(rescaling(x), sae(x * factor) / factor) < 1e-12


def test_layer_norm_standardises_each_row_and_adds_eps_on_the_way_in_alone(sae, x):
    normalising = build_like(sae, normalize_activations="layer_norm")
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (std + 1e-5)
    assert error(normalising.encode(x), sae.encode(z)) < 1e-12
    assert error(normalising(x), sae(z) * std + mean) < 1e-12


def test_heads_and_layer_norm_go_together(sae, x):
    plain = build_like(sae, normalize_activations="layer_norm")
    heads = build_like(sae, normalize_activations="layer_norm", reshape_activations="hook_z")
    assert error(heads(x.unflatten(-1, (4, 3))), plain(x).unflatten(-1, (4, 3))) < 1e-12


def test_the_trainers_normalisation_is_none_of_the_saes(sae, x):
    scaled_by_trainer = build_like(sae, normalize_activations="expected_average_only_in")
    assert torch.equal(scaled_by_trainer(x), sae(x))


def test_rows_of_another_width_are_refused(sae, x):
    narrow = x[..., :-1]
    for call in (sae, sae.encode, sae.encode_sparse, lambda rows: sae.loss(rows.flatten(0, 1))):
        with pytest.raises(ValueError, match=r"x must have shape \[..., D\] with D = 12, got"):
            call(narrow)


BAD_CONFIGS = {
    "d_in must be at least 1, got 0": (TopKConfig, {"d_in": 0}),
    "d_sae must be at least 1, got -1": (StandardConfig, {"d_sae": -1}),
    "k must be in [1, d_sae] with d_sae = 40, got 41": (TopKConfig, {"k": 41}),
    "k must be in [1, d_sae] with d_sae = 40, got 0": (TopKConfig, {"k": 0}),
    "normalize_activations must be one of ['none', ": (TopKConfig, {"normalize_activations": "l2"}),
    "reshape_activations must be one of ['none', ": (TopKConfig, {"reshape_activations": "heads"}),
    "dtype must name a floating torch dtype, got 'float33'": (TopKConfig, {"dtype": "float33"}),
    "dtype must name a floating torch dtype, got 'int64'": (TopKConfig, {"dtype": "int64"}),
    "decoder_init_norm must be above 0, got 0": (StandardConfig, {"decoder_init_norm": 0.0}),
    "l1_warm_up_steps must be at least 0, got -1": (StandardConfig, {"l1_warm_up_steps": -1}),
    "lp_norm must be above 0, got 0": (StandardConfig, {"lp_norm": 0.0}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
@pytest.mark.usefixtures("no_type_checker")
def test_config_is_refused(message):
    config_class, fields = BAD_CONFIGS[message]
    shape = {"d_in": D, "d_sae": F} | ({"k": K} if config_class is TopKConfig else {})
    with pytest.raises(ValueError) as caught:
        config_class(**{**shape, **fields})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("architecture", SAES)
def test_forward_and_acts_carry_gradients(architecture):
    sae_class = SAES[architecture]
    shape = {"d_in": 6, "d_sae": 20, "k": 3, "n_heads": 2, "bottleneck_factor": 5}
    sae = sae_class(sae_class.config_class.from_dict(shape))
    x = torch.randn(5, 6, requires_grad=True)
    sae(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    sae.zero_grad()
    sae.encode(x).sum().backward()
    learned = sae.W_enc if sae.W_enc.is_leaf else sae.W_dec
    assert learned.grad is not None and learned.grad.abs().max() > 0


def test_the_gradient_of_topk_acts_reaches_the_decoder_norms():
    config = {"d_in": 6, "d_sae": 20, "k": 3, "rescale_acts_by_decoder_norm": True}
    sae = SAES["topk"](SAES["topk"].config_class.from_dict(config))
    x = torch.randn(5, 6)
    sae.encode(x).sum().backward()
    W_dec = sae.W_dec.detach().clone().requires_grad_()
    h = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach() * W_dec.norm(dim=1)
    h.relu().topk(3).values.sum().backward()
    assert sae.W_dec.grad is not None and W_dec.grad is not None
    assert torch.allclose(sae.W_dec.grad, W_dec.grad, atol=1e-6)


@pytest.mark.parametrize("to_input", [False, True])
def test_latents_that_fire_too_often_pay_the_frequency_penalty(to_input):
    """c sum_j f_j max(0, log10(f_j / target)): the weight is constant, the frequency learns."""
    torch.manual_seed(0)
    shape: Any = {"d_in": 6, "d_sae": 20, "dtype": "float64", "l0_coefficient": 0.5}
    shape |= {"jumprelu_bandwidth": 0.4, "jumprelu_ste_to_input": to_input}
    with_it = JumpReLUSAE(JumpReLUConfig(frequency_coefficient=3.0, target_frequency=0.3, **shape))
    without = JumpReLUSAE(JumpReLUConfig(**shape))
    with torch.no_grad():
        with_it.W_enc.normal_()
        with_it.b_enc.normal_()
    without.load_state_dict(with_it.state_dict())
    x = torch.randn(50, 6, dtype=torch.float64)
    found, plain = with_it.loss(x), without.loss(x)
    h = x @ with_it.W_enc + with_it.b_enc
    threshold = with_it.threshold.double()
    frequency = (h > threshold).double().mean(0)
    weight = 3.0 * (frequency / 0.3).clamp_min(1).log10()
    assert 0 < int((weight > 0).sum()) < 20
    expected = 0.5 * (frequency * weight).sum()
    assert error(found.terms["frequency"], expected) < 1e-6
    assert error(found.total, plain.total + expected) < 1e-6
    got = torch.autograd.grad(found.total, [with_it.threshold, with_it.b_enc])
    base = torch.autograd.grad(plain.total, [without.threshold, without.b_enc])
    band = ((h - threshold).abs() < 0.2).double().sum(0) / 0.4 / len(x)
    wanted = 0.5 * weight * band
    assert error(got[0] - base[0], -wanted) < 1e-6
    assert error(got[1], base[1] + wanted if to_input else base[1]) < 1e-6
