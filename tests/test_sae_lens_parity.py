"""Parity with SAELens 6.54 by running it: outputs, losses, gradients, files, training steps."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import fastsae
from fastsae import (
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    StandardConfig,
    TopKConfig,
    TrainConfig,
    Trainer,
)
from parity import relative_error

D, F, K, B = 24, 160, 8, 96
TOLERANCE = 1e-4
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
LR = 1e-3
METADATA = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128}
TOPK = {
    f"{'scaled' if scaled else 'unscaled'}-{'centred' if centred else 'uncentred'}": {
        "rescale_acts_by_decoder_norm": scaled,
        "apply_b_dec_to_input": centred,
    }
    for scaled in (True, False)
    for centred in (True, False)
}
STANDARD = {
    "centred": {"apply_b_dec_to_input": True},
    "uncentred": {"apply_b_dec_to_input": False},
    "p2": {"lp_norm": 2.0},
}


@pytest.fixture(scope="session")
def imported():
    """SAELens's names; what it and its dependencies warn of at import is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.training.sae_trainer import SAETrainer
    assert sae_lens.__version__.startswith("6.54.")
    return SimpleNamespace(
        SAE=sae_lens.SAE,
        SAEMetadata=sae_lens.saes.sae.SAEMetadata,
        topk=(sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
        standard=(sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
        TrainStepInput=TrainStepInput,
        SAETrainer=SAETrainer,
        SAETrainerConfig=SAETrainerConfig,
        LoggingConfig=LoggingConfig,
    )


@pytest.fixture
def peer(imported):
    """SAELens, with its warnings off while a test runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield imported


def pair(peer, architecture, **fields):
    """One SAE twice, fastsae's and SAELens's, with weights that training could have left."""
    config_class = {"topk": TopKConfig, "standard": StandardConfig}[architecture]
    fields = {"d_in": D, "d_sae": F, **({"k": K} if architecture == "topk" else {}), **fields}
    ours = fastsae.SAES[architecture](config_class(**fields, metadata=METADATA))
    their_class, their_config = getattr(peer, architecture)
    theirs = their_class(their_config(**fields, metadata=peer.SAEMetadata(**METADATA)))
    with torch.no_grad():
        ours.W_enc.add_(torch.randn(D, F) * 0.1)
        ours.W_dec.mul_(torch.rand(F, 1) * 8 + 2)
        ours.b_enc.normal_(std=0.1)
        ours.b_dec.normal_()
    copy_weights(ours, theirs)
    return ours, theirs


def copy_weights(source, target):
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(target, name).copy_(getattr(source, name))


def rows(n=B):
    """Rows with structure, so that residuals and gradients are not noise."""
    return torch.randn(n, 6) @ torch.randn(6, D) + 0.3 * torch.randn(n, D) + 1


def gradients(sae, loss):
    parameters = [getattr(sae, name) for name in PARAMETERS]
    return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)


def their_losses(peer, theirs, x, dead=None, coefficients=None):
    step_input = peer.TrainStepInput(x, coefficients or {}, dead, 0, False)
    output = theirs.training_forward_pass(step_input)
    return output.loss, output.losses


def assert_close(got, want, name, tolerance=TOLERANCE):
    error = relative_error(got.detach(), want.detach())
    assert error <= tolerance, f"{name}: {error:.1e}"


def assert_gradients_close(got, want):
    for name, ours, theirs in zip(PARAMETERS, got, want, strict=True):
        assert_close(ours, theirs, f"gradient of {name}")


def assert_same_function(ours, theirs, x):
    acts = theirs.encode(x)
    assert_close(ours.encode(x), acts, "encode")
    assert ((ours.encode(x) != 0) == (acts != 0)).all()
    assert_close(ours.decode(acts), theirs.decode(acts), "decode")
    assert_close(ours.decode(ours.encode_sparse(x)).reshape(x.shape), theirs(x), "decode of a code")
    assert_close(ours(x), theirs(x), "forward")


@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_topk_outputs(peer, fields):
    assert_same_function(*pair(peer, "topk", **fields), rows().reshape(2, -1, D))


@pytest.mark.parametrize("fields", STANDARD.values(), ids=STANDARD)
def test_standard_outputs(peer, fields):
    assert_same_function(*pair(peer, "standard", **fields), rows().reshape(2, -1, D))


@pytest.mark.parametrize("mode", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_run_time_normalisation(peer, architecture, mode):
    ours, theirs = pair(peer, architecture, normalize_activations=mode)
    x = rows()
    assert_close(ours.encode(x), theirs.encode(x), "encode")
    assert_close(ours(x), theirs(x), "forward")


@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_mse_alone(peer, fields):
    ours, theirs = pair(peer, "topk", **fields)
    x = rows()
    loss, (_, losses) = ours.loss(x), their_losses(peer, theirs, x)
    assert_close(loss.total, losses["mse_loss"], "mse")
    assert_gradients_close(gradients(ours, loss.total), gradients(theirs, losses["mse_loss"]))


@pytest.mark.parametrize("fields", STANDARD.values(), ids=STANDARD)
def test_mse_of_standard_alone(peer, fields):
    ours, theirs = pair(peer, "standard", l1_coefficient=0.0, **fields)
    x = rows()
    loss, (_, losses) = ours.loss(x), their_losses(peer, theirs, x, coefficients={"l1": 0.0})
    assert_close(loss.total, losses["mse_loss"], "mse")
    assert_gradients_close(gradients(ours, loss.total), gradients(theirs, losses["mse_loss"]))


@pytest.mark.parametrize("n_dead", [5, 40, F], ids=lambda n: f"{n}-dead")
@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_auxk_alone(peer, fields, n_dead):
    ours, theirs = pair(peer, "topk", **fields)
    x, dead = rows(), torch.randperm(F) < n_dead
    _, losses = their_losses(peer, theirs, x, dead)
    auxk = losses["auxiliary_reconstruction_loss"]
    loss = ours.loss(x, dead)
    assert_close(loss.terms["auxk"], auxk, "auxk")
    found = gradients(ours, loss.total - ours.loss(x).total)
    assert_gradients_close(found, gradients(theirs, auxk))
    assert found[0].any(), "AuxK gives the encoder no gradient"


@pytest.mark.parametrize("fields", STANDARD.values(), ids=STANDARD)
def test_l1_alone(peer, fields):
    ours, theirs = pair(peer, "standard", l1_coefficient=3.0, **fields)
    without, _ = pair(peer, "standard", l1_coefficient=0.0, **fields)
    copy_weights(ours, without)
    x = rows()
    _, losses = their_losses(peer, theirs, x, coefficients={"l1": 3.0})
    loss = ours.loss(x)
    assert_close(loss.terms["l1"], losses["l1_loss"], "l1")
    mse = gradients(without, without.loss(x).total)
    found = [a - b for a, b in zip(gradients(ours, loss.total), mse, strict=True)]
    assert_gradients_close(found, gradients(theirs, losses["l1_loss"]))


@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_topk_total(peer, fields):
    ours, theirs = pair(peer, "topk", aux_loss_coefficient=0.5, **fields)
    x, dead = rows(), torch.arange(F) % 4 == 0
    loss, (total, _) = ours.loss(x, dead), their_losses(peer, theirs, x, dead)
    assert_close(loss.total, total, "total")
    assert_gradients_close(gradients(ours, loss.total), gradients(theirs, total))


@pytest.mark.parametrize("fields", STANDARD.values(), ids=STANDARD)
@pytest.mark.parametrize("step", [0, 3, 10, 11])
def test_standard_total_with_the_warmed_up_coefficient(peer, fields, step):
    ours, theirs = pair(peer, "standard", l1_coefficient=2.0, l1_warm_up_steps=10, **fields)
    schedulers = their_trainer(peer, theirs).coefficient_schedulers
    for _ in range(step):
        schedulers["l1"].step()
    coefficients = {"l1": schedulers["l1"].value}
    x = rows()
    total, losses = their_losses(peer, theirs, x, coefficients=coefficients)
    loss = ours.loss(x, step=step)
    assert_close(loss.total, total, "total")
    assert_close(loss.terms["l1"], losses["l1_loss"], "l1")
    assert_gradients_close(gradients(ours, loss.total), gradients(theirs, total))


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_their_reader_takes_our_folder(peer, architecture, tmp_path):
    ours, _ = pair(peer, architecture)
    ours.save_model(tmp_path)
    theirs = peer.SAE.load_from_disk(tmp_path)
    assert_same_function(ours, theirs, rows())
    assert {name: theirs.cfg.metadata[name] for name in METADATA} == METADATA
    for name in ("d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations"):
        assert getattr(theirs.cfg, name) == getattr(ours.cfg, name), name


@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_their_reader_takes_every_topk_setting(peer, fields, tmp_path):
    ours, _ = pair(peer, "topk", **fields)
    ours.save_model(tmp_path)
    assert_same_function(ours, peer.SAE.load_from_disk(tmp_path), rows())


@pytest.mark.parametrize("fields", TOPK.values(), ids=TOPK)
def test_our_reader_takes_their_topk_folder(peer, fields, tmp_path):
    _, theirs = pair(peer, "topk", **fields)
    theirs.save_inference_model(tmp_path)
    ours = fastsae.TopKSAE.load_from_disk(tmp_path)
    assert_same_function(ours, peer.SAE.load_from_disk(tmp_path), rows())
    assert {name: ours.cfg.metadata[name] for name in METADATA} == METADATA
    assert ours.cfg.k == K and ours.W_enc.stride() == (1, D)


@pytest.mark.parametrize("fields", STANDARD.values(), ids=STANDARD)
def test_our_reader_takes_their_standard_folder(peer, fields, tmp_path):
    _, theirs = pair(peer, "standard", **fields)
    theirs.save_inference_model(tmp_path)
    ours = fastsae.SAE.load_from_disk(tmp_path)
    assert_same_function(ours, peer.SAE.load_from_disk(tmp_path), rows())
    assert {name: ours.cfg.metadata[name] for name in METADATA} == METADATA


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_our_reader_takes_their_training_checkpoint(peer, architecture, tmp_path):
    ours, theirs = pair(peer, architecture)
    theirs.save_model(tmp_path)
    loaded = fastsae.SAE.load_from_disk(tmp_path)
    assert_same_function(loaded, theirs, rows())
    assert all(torch.equal(getattr(loaded, name), getattr(ours, name)) for name in PARAMETERS)


def test_folding_is_theirs(peer):
    ours, theirs = pair(peer, "topk")
    ours.fold_W_dec_norm()
    theirs.fold_W_dec_norm()
    ours.fold_activation_scale(3.0)
    theirs.fold_activation_norm_scaling_factor(3.0)
    for name in PARAMETERS:
        assert_close(getattr(ours, name), getattr(theirs, name), name)


def their_trainer(peer, sae):
    cfg = peer.SAETrainerConfig(
        total_training_samples=1000 * B,
        train_batch_size_samples=B,
        device="cpu",
        lr=LR,
        lr_end=LR,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=4,
        logger=peer.LoggingConfig(log_to_wandb=False),
    )
    return peer.SAETrainer(cfg, sae, iter(()))


@pytest.mark.parametrize("kind", ["row_adam", "adam"])
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_training_steps_give_the_same_weights(peer, architecture, kind):
    warm_up = {"l1_coefficient": 0.5, "l1_warm_up_steps": 6} if architecture == "standard" else {}
    ours, theirs = pair(peer, architecture, **warm_up)
    optimizer = OptimizerConfig(kind=kind, lr=LR, betas=(0.9, 0.999), clip_norm=1.0)
    cfg = TrainConfig(
        sae=ours.cfg,
        data=DataConfig(total_tokens=1000 * B, batch_size=B),
        dead_window=4 * B,
        optimizer=optimizer,
        schedule=ScheduleConfig(warm_up_steps=0, decay_steps=0),
    )
    trainer, peer_trainer = Trainer(cfg, device="cpu"), their_trainer(peer, theirs)
    copy_weights(theirs, trainer.sae)
    auxk = 0.0
    for step in range(10):
        x = rows()
        loss, output = trainer.step(x), peer_trainer.step(x)
        peer_trainer.n_training_steps += 1
        assert_close(loss.total, output.loss, f"loss of step {step}")
        assert torch.equal(loss.counts.bool(), output.feature_acts.bool().any(0))
        assert torch.equal(trainer.dead.dead(), peer_trainer.dead_neurons)
        auxk += float(loss.terms.get("auxk", torch.zeros(())))
    for name in PARAMETERS:
        start, here, there = (getattr(sae, name) for sae in (ours, trainer.sae, theirs))
        assert_close(here, there, name)
        # Adam's first steps depend on little but the gradient's sign, rounding where it is near 0.
        assert_close(here - start, there - start, f"way of {name}", tolerance=2e-3)
    assert auxk > 0 or architecture == "standard"
