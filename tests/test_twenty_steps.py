"""Twenty steps of fastsae's trainer beside SAELens 6.54's own, from the same weights and rows.

Rounding lets the weights drift apart, and then a latent may be selected on a row by one and not by
the other: losses agree to 1e-3, and such flips are counted and printed.
"""

import copy
import warnings
from typing import Any

import pytest
import torch

from bench.providers.sae_lens import sae_lens_config
from fastsae import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, Trainer
from sae_lens_pairs import AUXILIARY, CASES, RUN_TIME, TERMS, B, D, F, assert_close, pair, rows

STEPS, LR, TOLERANCE = 20, 1e-3, 1e-3
NEVER = 1000
DEAD_AFTER = 2
FLIPS = 0.002  # of the selections, at most
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dead": {},
    "uncentred": {"apply_b_dec_to_input": False},
    "unscaled": {"rescale_acts_by_decoder_norm": False},
    "warm-up": {"warm_up_steps": 10},
    "hook_z": {"reshape_activations": "hook_z"},
    "expected_average_only_in": {"normalize_activations": "expected_average_only_in"},
    "covariance_whitening": {"normalize_activations": "covariance_whitening"},
    **{mode: {"normalize_activations": mode} for mode in RUN_TIME},
}


def runs():
    for case, (architecture, fields) in CASES.items():
        for setting in SETTINGS:
            warmed = {"standard": "l1", "gated": "l1", "jumprelu": "l0"}.get(architecture)
            if (
                # p < 1: |acts|^p has no derivative at 0, and SAELens's gradient is NaN.
                case == "standard-p0.7"
                or (setting == "unscaled" and architecture not in AUXILIARY)
                or (setting == "warm-up" and warmed is None)
                # SAELens refuses the one and fails in the other.
                or (setting == "covariance_whitening" and case == "matching-pursuit")
                or (setting in RUN_TIME and case.startswith("matryoshka"))
            ):
                continue
            changes = dict(SETTINGS[setting])
            if "warm_up_steps" in changes:
                changes[f"{warmed}_warm_up_steps"] = changes.pop("warm_up_steps")
            if setting in RUN_TIME and architecture in AUXILIARY:
                changes["aux_loss_coefficient"] = 0.0  # undefined there, and refused
            if not changes.items() <= fields.items() or setting in ("plain", "dead"):
                yield pytest.param(case, setting, changes, id=f"{case}-{setting}")


@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    assert sae_lens.__version__.startswith("6.54.")
    return sae_lens


def trainers(ours, theirs, dead_after):
    """Both trainers, each with the scale that it takes from the same sample of rows."""
    from sae_lens.training.sae_trainer import SAETrainer

    kind = "adam" if ours.cfg.architecture == "matching_pursuit" else "row_adam"
    cfg = TrainConfig(
        sae=ours.cfg,
        data=DataConfig(total_tokens=NEVER * B, batch_size=B),
        dead_window=dead_after * B,
        optimizer=OptimizerConfig(kind=kind, lr=LR, betas=(0.9, 0.999), clip_norm=1.0),
        schedule=ScheduleConfig(warm_up_steps=0, decay_steps=0),
    )
    trainer = Trainer(cfg, device="cpu")
    trainer.sae.load_state_dict(ours.state_dict())
    peer_trainer = SAETrainer(
        sae_lens_config(NEVER * B, B, LR, dead_window=dead_after), theirs, iter(())
    )
    sample, mode = rows(512), ours.cfg.normalize_activations
    trainer.scaling.fit(sample)
    scaler = peer_trainer.activation_scaler
    if mode == "expected_average_only_in":
        scaler.estimate_scaling_factor(D, iter([sample]), 1)
    elif mode == "covariance_whitening":
        scaler.estimate_whitening(D, iter([sample]), 1)
    return trainer, peer_trainer


def flips(found, wanted):
    """On how many rows a latent is selected by one and not by the other (at least, without code)"""
    theirs = wanted.feature_acts != 0
    if found.code is None:
        return int((found.counts - theirs.sum(0)).abs().sum())
    return int(((found.code.to_dense(F) != 0) != theirs).sum())


@pytest.mark.filterwarnings("ignore")  # SAELens's warnings are not ours
@pytest.mark.parametrize("case, setting, changes", list(runs()))
def test_twenty_steps(peer, case, setting, changes):
    torch.manual_seed(5)
    ours, theirs = pair(peer, case, **changes)
    if setting == "dead" and hasattr(ours, "threshold"):
        with torch.no_grad():
            for sae in (ours, theirs):
                sae.b_enc[::7] -= 20
    start = copy.deepcopy(ours.state_dict())
    trainer, peer_trainer = trainers(ours, theirs, DEAD_AFTER if setting == "dead" else NEVER)
    flipped = selected = 0
    revived = set()
    for step in range(STEPS):
        x = rows()
        assert torch.equal(trainer.dead.dead(), peer_trainer.dead_neurons), f"dead at {step}"
        found, wanted = trainer.step(x), peer_trainer.step(x)
        peer_trainer.n_training_steps += 1
        assert_close(found.total, wanted.loss, f"total of step {step}", TOLERANCE)
        for theirs_name, value in wanted.losses.items():
            own = TERMS.get(theirs_name, "auxiliary" if "auxiliary" in found.terms else "auxk")
            if value != 0:
                assert_close(found.terms[own], value, f"{own} of step {step}", TOLERANCE)
                revived.add(own)
        flipped += flips(found, wanted)
        selected += int((wanted.feature_acts != 0).sum())
    print(f"{case}, {setting}: {flipped} of {selected} selections flipped in {STEPS} steps")
    assert flipped <= FLIPS * selected
    if setting == "dead" and ours.cfg.architecture in AUXILIARY:
        assert "auxk" in revived
    if setting == "dead" and case == "jumprelu-pre-act":
        assert "pre_act" in revived
    if hasattr(theirs, "topk_threshold"):
        assert float(theirs.topk_threshold) > 0
        assert_close(trainer.sae.topk_threshold, theirs.topk_threshold, "topk_threshold", TOLERANCE)
    for name, value in trainer.sae.state_dict().items():
        if name != "topk_threshold":
            moved, wanted = value - start[name], theirs.state_dict()[name] - start[name]
            assert (moved - wanted).norm() <= 0.05 * wanted.norm(), name
            assert moved.any() or (name == "b_dec" and setting == "uncentred"), name
