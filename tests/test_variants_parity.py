"""Every variant of `SAES` against SAELens 6.54 run beside it: outputs, losses, gradients, files."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastsae
from fastsae import SAES, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, Trainer
from fastsae_kernels import workspace
from sae_lens_pairs import (
    AUXILIARY,
    CASES,
    RUN_TIME,
    TERMS,
    TRANSCODERS,
    B,
    D,
    F,
    assert_close,
    pair,
    randomised,
    rows,
    their_loss,
)

DEAD = torch.arange(F) % 5 == 0


@pytest.fixture(autouse=True)
def quiet():
    """SAELens's warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    assert sae_lens.__version__.startswith("6.54.")
    return sae_lens


def assert_same_loss(peer, ours, theirs, x, dead):
    found, wanted = ours.loss(x, dead), their_loss(peer, theirs, x, dead)
    assert_close(found.total, wanted.loss, "total", 1e-5)
    auxiliary = wanted.losses.pop("auxiliary_reconstruction_loss", None)
    if auxiliary is not None and auxiliary != 0:
        own = "auxiliary" if "auxiliary" in found.terms else "auxk"
        assert_close(found.terms[own], auxiliary, own, 1e-5)
    for name, value in wanted.losses.items():
        if value != 0:
            assert_close(found.terms[TERMS[name]], value, name, 1e-5)
    assert_close(found.x_hat, wanted.sae_out, "x_hat", 1e-5)
    assert torch.equal(found.counts > 0, (wanted.feature_acts != 0).any(0))
    here = dict(ours.named_parameters())
    there = dict(theirs.named_parameters())
    assert here.keys() == there.keys()
    got = torch.autograd.grad(found.total, list(here.values()), materialize_grads=True)
    want = torch.autograd.grad(wanted.loss, [there[name] for name in here], materialize_grads=True)
    for name, a, b in zip(here, got, want, strict=True):
        assert_close(a, b, f"gradient of {name}", 1e-4)


def test_every_variant_is_covered():
    architectures = {architecture for architecture, _ in CASES.values()}
    assert architectures | TRANSCODERS | {"legacy_standard", "temporal"} == set(SAES)


@pytest.mark.parametrize("dead", [None, DEAD], ids=["alive", "dead"])
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(peer, case, centred, dead):
    torch.manual_seed(0)
    ours, theirs = pair(peer, case, apply_b_dec_to_input=centred)
    assert_same_loss(peer, ours, theirs, rows(), dead)


# SAELens's own matryoshka loss fails there: it has forgotten the norms when it decodes the levels.
@pytest.mark.parametrize("mode", RUN_TIME)
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("matryoshka")])
def test_losses_and_gradients_under_run_time_normalisation(peer, case, mode):
    torch.manual_seed(1)
    ours, theirs = pair(peer, case, normalize_activations=mode)
    dead = None if CASES[case][0] in AUXILIARY else DEAD
    assert_same_loss(peer, ours, theirs, rows(), dead)


@pytest.mark.parametrize("mode", RUN_TIME)
@pytest.mark.parametrize("case", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_auxk_under_run_time_normalisation_is_refused(peer, case, mode):
    ours, _ = pair(peer, case, normalize_activations=mode)
    with pytest.raises(ValueError, match="aux_loss_coefficient must be 0 to train with"):
        ours.loss(rows(), DEAD)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["none", *RUN_TIME])
def test_outputs(peer, case, mode):
    torch.manual_seed(2)
    ours, theirs = pair(peer, case, normalize_activations=mode)
    x = rows().reshape(4, -1, D)
    with torch.no_grad():
        # Batch top-k counts rows along all leading axes, so it needs the same ones.
        acts = theirs.encode(x)
        assert_close(ours.encode(x), acts, "encode", 1e-5)
        assert_close(ours.decode(acts), theirs.decode(acts), "decode", 1e-5)
        assert_close(ours(x), theirs(x), "forward", 1e-5)
        code = ours.encode_sparse(x)
        assert_close(code.to_dense(F).reshape(acts.shape), acts, "encode_sparse", 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_heads_come_apart_or_flattened(peer, case, mode):
    torch.manual_seed(12)
    ours, theirs = pair(peer, case, reshape_activations="hook_z", normalize_activations=mode)
    flat = rows().reshape(4, -1, D)
    z = flat.unflatten(-1, (2, -1))
    with torch.no_grad():
        want = theirs.encode(flat)
        theirs.turn_on_forward_pass_hook_z_reshaping()  # off in their training form
        assert_close(ours.encode(z), theirs.encode(z), "encode", 1e-5)
        assert_close(ours(z), theirs(z), "forward", 1e-5)
        assert_close(ours.encode(flat), want, "encode of flattened heads", 1e-5)
        assert_close(ours(flat), ours(z).flatten(-2), "forward of flattened heads", 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_for_use_is_theirs_to_load(peer, case, tmp_path):
    torch.manual_seed(3)
    ours, theirs = pair(peer, case)
    for _ in range(3):  # gives batch top-k its threshold
        x = rows()
        ours.loss(x)
        their_loss(peer, theirs, x, None)
    ours.inference_form().save_model(tmp_path / "ours")
    theirs.save_inference_model(tmp_path / "theirs")
    x = rows()
    with torch.no_grad():
        for folder in ("ours", "theirs"):
            mine = fastsae.SAE.load_from_disk(tmp_path / folder)
            peers = peer.SAE.load_from_disk(tmp_path / folder)
            assert mine.cfg.architecture == peers.cfg.architecture()
            assert_close(mine.encode(x), peers.encode(x), f"encode from {folder}", 1e-5)
            assert_close(mine(x), peers(x), f"forward from {folder}", 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c != "matching-pursuit"])
def test_folding_keeps_the_function_and_is_theirs(peer, case):
    torch.manual_seed(4)
    ours, theirs = pair(peer, case)
    x = rows()
    if getattr(ours.cfg, "rescale_acts_by_decoder_norm", True):
        ours.fold_W_dec_norm()
        theirs.fold_W_dec_norm()
    ours.fold_activation_scale(3.0)
    theirs.fold_activation_norm_scaling_factor(3.0)
    mean, matrix = torch.randn(D).double(), torch.eye(D).double() + 0.1 * torch.randn(D, D).double()
    ours.fold_activation_whitening(mean, matrix, matrix.inverse())
    theirs.fold_activation_whitening(mean.float(), matrix.float(), matrix.inverse().float())
    for name, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[name], name, 1e-4)
    assert_close(ours(x), theirs(x), "forward", 1e-4)


TRAINED = [c for c in CASES if c not in ("standard-p0.7", "matching-pursuit")]


@pytest.mark.parametrize("case", TRAINED)
def test_row_adam_gives_the_weights_of_adam(case):
    architecture, fields = CASES[case]
    config = SAES[architecture].config_class(d_in=D, d_sae=F, **fields)
    trained = []
    for kind in ("row_adam", "adam"):
        torch.manual_seed(6)
        optimizer = OptimizerConfig(kind=kind, lr=1e-3)
        cfg = TrainConfig(
            sae=replace(config, normalize_activations="covariance_whitening"),
            data=DataConfig(total_tokens=40 * B, batch_size=B),
            dead_window=2 * B,
            optimizer=optimizer,
            schedule=ScheduleConfig(warm_up_steps=0, decay_steps=0),
        )
        trainer = Trainer(cfg, device="cpu")
        trainer.initialise(rows(512))
        for _ in range(8):
            trainer.step(rows())
        trained.append(trainer.export())
    for (name, a), b in zip(
        trained[0].state_dict().items(), trained[1].state_dict().values(), strict=True
    ):
        assert_close(a, b, name, 2e-3)


@pytest.mark.parametrize("sparse", [True, False], ids=["pairs", "chunks"])
@pytest.mark.parametrize("case", ["standard", "jumprelu-step", "jumprelu-quadratic"])
def test_pairs_and_chunks_give_the_same_loss(peer, case, sparse, monkeypatch):
    module = {"standard": "standard"}.get(case, "jumprelu")
    monkeypatch.setattr(f"fastsae.saes.{module}.is_sparse", lambda *_: sparse)
    torch.manual_seed(7)
    ours, theirs = pair(peer, case)
    with workspace(1 << 20):
        assert_same_loss(peer, ours, theirs, rows(200), None)


@pytest.mark.parametrize("architecture", sorted(TRANSCODERS))
def test_transcoder_outputs(peer, architecture, tmp_path):
    torch.manual_seed(8)
    fields = {"d_in": D, "d_out": 10, "d_sae": F, "apply_b_dec_to_input": False}
    their_class, their_config = peer.registry.get_sae_class(architecture)
    theirs = their_class(their_config(**fields))
    theirs.load_state_dict(randomised(theirs.state_dict()))
    ours = SAES[architecture](SAES[architecture].config_class(**fields))
    ours.load_state_dict(theirs.state_dict())
    x = rows().reshape(4, -1, D)
    ours.save_model(tmp_path)
    with torch.no_grad():
        for loaded in (ours, fastsae.SAE.load_from_disk(tmp_path)):
            assert_close(loaded.encode(x), theirs.encode(x), "encode", 1e-5)
            assert_close(loaded(x), theirs(x), "forward", 1e-5)
        assert_close(peer.SAE.load_from_disk(tmp_path)(x), theirs(x), "their reader", 1e-5)
    assert_close(ours(x), theirs(x), "forward with gradient", 1e-5)


@pytest.mark.parametrize("architecture", sorted(TRANSCODERS))
def test_transcoders_train_to_the_dense_gradient(architecture):
    torch.manual_seed(9)
    kind: Any = SAES[architecture]
    sae = kind(kind.config_class(d_in=D, d_out=10, d_sae=F, dtype="float64"))
    sae.load_state_dict(randomised(sae.state_dict()))
    x, target = rows().double(), torch.randn(B, 10, dtype=torch.float64)
    found = sae.loss(x, target=target)
    h = x @ sae.W_enc + sae.b_enc
    gate = h > sae.threshold if "jumprelu" in architecture else h > 0
    y_hat = (h * gate) @ sae.W_dec + sae.b_dec
    y_hat = y_hat + x @ sae.W_skip.t() if "skip" in architecture else y_hat
    mse = (y_hat - target).square().sum(-1).mean()
    sparsity = gate.sum(-1).double().mean()
    if "jumprelu" not in architecture:
        sparsity = (h.relu() * sae.W_dec.norm(dim=1)).sum(-1).mean()
    assert_close(found.total, mse + sparsity, "total", 1e-6)
    assert_close(found.x_hat, y_hat, "y_hat", 1e-6)
    learned = {name: p for name, p in sae.named_parameters() if name != "threshold"}
    got = torch.autograd.grad(found.total, list(learned.values()))
    want = torch.autograd.grad(mse + sparsity, list(learned.values()))
    for name, a, b in zip(learned, got, want, strict=True):
        assert_close(a, b, f"gradient of {name}", 1e-6)


@pytest.mark.parametrize("kind", ["row_adam", "adam"])
@pytest.mark.parametrize("architecture", sorted(TRANSCODERS))
def test_transcoders_learn_and_export_takes_rows_as_they_are(architecture, kind):
    torch.manual_seed(10)
    truth = torch.randn(D, 10)
    fields = {"l0_coefficient": 0.01} if "jumprelu" in architecture else {"l1_coefficient": 0.01}
    kind_of_config: Any = SAES[architecture].config_class
    config = kind_of_config(
        d_in=D, d_out=10, d_sae=F, normalize_activations="expected_average_only_in", **fields
    )
    cfg = TrainConfig(
        sae=config,
        data=DataConfig(total_tokens=300 * B, batch_size=B),
        optimizer=OptimizerConfig(kind=kind, lr=3e-3),
        schedule=ScheduleConfig(warm_up_steps=0, decay_steps=0),
    )
    trainer = Trainer(cfg, device="cpu")

    def batches():
        while True:
            x = rows()
            yield x, 7 * x @ truth

    sae = trainer.fit(batches())
    x, y = next(batches())
    with torch.no_grad():
        fvu = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert sae.cfg.normalize_activations == "none" and fvu < 0.2


def test_a_target_is_for_transcoders():
    config = fastsae.TopKConfig(d_in=D, d_sae=F, k=4)
    trainer = Trainer(
        TrainConfig(sae=config, data=DataConfig(total_tokens=B, batch_size=B)), device="cpu"
    )
    with pytest.raises(ValueError, match="target must be given for transcoders and for nothing"):
        trainer.step(rows(), rows())
    config = fastsae.TranscoderConfig(d_in=D, d_out=D, d_sae=F)
    trainer = Trainer(
        TrainConfig(sae=config, data=DataConfig(total_tokens=B, batch_size=B)), device="cpu"
    )
    with pytest.raises(ValueError, match="target must be given .* got None"):
        trainer.step(rows())
