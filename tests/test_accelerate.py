"""SAELens's own trainer with fastsae's ops inside against the same trainer without."""

import copy
import warnings
from typing import Any

import pytest
import torch

from bench.providers.sae_lens import sae_lens_config
from parity import relative_error

D, F, B, STEPS = 16, 96, 64, 20


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASES: dict[str, dict[str, Any]] = {
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "batchtopk": {"k": 6.5},
    "matryoshka_batchtopk": {"k": 6.5, "matryoshka_widths": [16, 40, F]},
    "standard": {"l1_coefficient": 0.3, "l1_warm_up_steps": 10},
    "gated": {"l1_coefficient": 0.3, "l1_warm_up_steps": 10},
    "jumprelu": {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.5, "l0_warm_up_steps": 10},
}


def trainer_of(sae):
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = sae_lens_config(1000 * B, B, 1e-3, dead_window=4)
    return SAETrainer(cfg, sae, iter(()))


@pytest.mark.parametrize("architecture", CASES)
def test_twenty_steps_of_its_own_trainer(architecture):
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    torch.manual_seed(0)
    sae_class, config_class = sae_lens.registry.get_sae_training_class(architecture)
    plain = sae_class(config_class(d_in=D, d_sae=F, **CASES[architecture]))
    fast = accelerate(copy.deepcopy(plain))
    trainers = trainer_of(fast), trainer_of(plain)
    mixed = torch.randn(5, D)
    for step in range(STEPS):
        x = torch.randn(B, 5) @ mixed + 0.3 * torch.randn(B, D) + 0.5
        got, want = (trainer.step(x) for trainer in trainers)
        for trainer in trainers:
            trainer.n_training_steps += 1
        tolerance = 1e-5 if step == 0 else 1e-3
        assert relative_error(got.loss.detach(), want.loss.detach()) < tolerance
        assert got.losses.keys() == want.losses.keys()
        for name, value in want.losses.items():
            if float(value) > 1e-6:
                assert relative_error(got.losses[name].detach(), value.detach()) < tolerance, name
        assert relative_error(got.sae_out.detach(), want.sae_out.detach()) < 10 * tolerance
        fires = torch.equal(trainers[0].dead_neurons, trainers[1].dead_neurons)
        assert fires and torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    for name, value in plain.state_dict().items():
        assert relative_error(fast.state_dict()[name], value) < 1e-3, name
    assert type(fast) is type(plain) and fast.W_enc.stride() == (1, D)


def test_what_cannot_be_accelerated_is_named():
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    inference = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=3))
    with pytest.raises(TypeError, match="training_sae must be a TrainingSAE of SAELens, got TopK"):
        accelerate(inference)
