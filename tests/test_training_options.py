"""What a run can be told: schedules, unit decoder rows, micro-batches, a start, a signal."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

import fastsae
from fastsae import (
    SAE,
    SAES,
    BatchTopKConfig,
    LegacyStandardConfig,
    ScheduleConfig,
    StandardConfig,
    TopKSAE,
    Trainer,
)
from fastsae.saes.standard import ghost_loss
from fastsae.training.centre import geometric_median
from fastsae.training.directions import AT_ONCE, apart, whitened
from fastsae.training.interruption import EXIT_CODE, Interrupted
from fastsae.training.schedule import lr_factor
from parity import relative_error
from tiny_models import save_tiny_llama
from training_runs import KINDS, ROWS, B, D, F, config, standard_config, topk_config, train

SCHEDULES = {
    "constant": "constant",
    "cosine": "cosineannealing",
    "cosine_restarts": "cosineannealingwarmrestarts",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warm_up, decay, cycles", [(0, 0, 1), (5, 0, 2), (0, 7, 3), (4, 6, 2)])
def test_a_schedule_is_saelenss(schedule, warm_up, decay, cycles):
    optim = pytest.importorskip("sae_lens.training.optim")
    steps, lr = 50, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = optim.get_lr_scheduler(
        SCHEDULES[schedule], optimizer, steps, lr, warm_up, decay, lr / 10, cycles
    )
    for step in range(steps):
        ours = lr_factor(step, steps, warm_up, decay, schedule, 0.1, cycles)
        assert math.isclose(ours * lr, optimizer.param_groups[0]["lr"], rel_tol=1e-6, abs_tol=1e-9)
        optimizer.step()
        theirs.step()


def test_the_trainer_follows_its_schedule():
    trainer = Trainer(
        config(20, schedule={"lr_curve": "cosine", "warm_up_steps": 4, "decay_steps": 0}),
        device="cpu",
    )
    rates = []
    for step in range(20):
        trainer.step(ROWS.batch(step))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    expected = [3e-3 * lr_factor(t, 20, 4, 0, "cosine", 0.1) for t in range(20)]
    assert rates == expected and rates[0] == 3e-3 / 4 and min(rates[4:]) < 4e-4


@pytest.mark.parametrize("sae", [topk_config(), standard_config()], ids=["topk", "standard"])
def test_decoder_rows_stay_on_the_sphere_by_either_optimizer(sae):
    trained = []
    for kind in KINDS:
        trainer = Trainer(
            config(10, kind, sae, optimizer={"unit_norm_decoder": True}), device="cpu"
        )
        trainer.initialise(ROWS.rows)
        for step in range(10):
            trainer.step(ROWS.batch(step))
        norms = trainer.sae.W_dec.norm(dim=1)
        assert torch.allclose(norms, torch.ones(F), atol=1e-5)
        trained.append(trainer.sae)
    ours, theirs = (sae.state_dict() for sae in trained)
    for name, value in ours.items():
        assert relative_error(value, theirs[name]) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sae", [topk_config(), standard_config()], ids=["topk", "standard"])
@pytest.mark.parametrize("width", [16, 24])
def test_micro_batches_give_the_gradient_of_the_batch(kind, sae, width):
    runs = [
        Trainer(
            config(20, kind, sae, data={"micro_batch_size": m}, dead_window=3 * B), device="cpu"
        )
        for m in (None, width)
    ]
    for trainer in runs:
        trainer.initialise(ROWS.rows)
    for step in range(20):
        whole, parts = (trainer.step(ROWS.batch(step)) for trainer in runs)
        tolerance = 1e-5 if step == 0 else 1e-3
        assert relative_error(parts.total, whole.total.detach()) < tolerance
        assert whole.terms.keys() == parts.terms.keys()
        for name, value in whole.terms.items():
            assert abs(float(parts.terms[name]) - float(value)) < tolerance * float(
                whole.total.detach()
            )
        if step == 0:
            assert torch.equal(parts.counts, whole.counts)
            assert relative_error(parts.err, whole.err) < 1e-5
            want, got = (trainer.sae.state_dict() for trainer in runs)
            assert all(relative_error(got[name], want[name]) < 1e-4 for name in want)


def test_batch_topk_selects_per_micro_batch():
    cfg = config(1, sae=BatchTopKConfig(d_in=D, d_sae=F, k=4), data={"micro_batch_size": 16})
    trainer = Trainer(cfg, device="cpu")
    trainer.initialise(ROWS.rows)
    batch = ROWS.batch(0)
    with torch.no_grad():
        x = trainer.scaling.apply(batch)
        parts = [trainer.sae.loss(part).err for part in x.split(16)]
        whole = trainer.sae.loss(x).err
    found = trainer.step(batch).err
    assert relative_error(found, torch.cat(parts)) < 1e-5
    assert relative_error(found, whole) > 1e-3


def test_the_geometric_median_ignores_massive_rows():
    rows = torch.randn(200, D, generator=torch.Generator().manual_seed(0)) + 3
    massive = torch.cat([rows, torch.full((5, D), 1e4)])
    assert (geometric_median(massive) - rows.mean(0)).norm() < 0.6
    median = geometric_median(rows)
    distance = lambda point: float((rows - point).norm(dim=1).sum())
    nudges = 0.02 * torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    assert all(distance(median) <= distance(median + nudge) for nudge in nudges)
    assert torch.equal(geometric_median(torch.ones(3, D)), torch.ones(D))


@pytest.mark.parametrize("start", ["zeros", "geometric_median", "mean"])
def test_b_dec_starts_where_it_is_told(start):
    trainer = Trainer(config(b_dec_init=start), device="cpu")
    trainer.initialise(ROWS.rows)
    scaled = trainer.scaling.apply(ROWS.rows)
    expected = {
        "zeros": torch.zeros(D),
        "geometric_median": geometric_median(scaled),
        "mean": scaled.mean(0),
    }
    assert torch.equal(trainer.sae.b_dec.detach(), expected[start])


@pytest.mark.parametrize("scaling", ["none", "layer_norm", "covariance_whitening"])
def test_latents_start_near_rows(scaling):
    sae = replace(topk_config(), normalize_activations=scaling, aux_loss_coefficient=0.0)
    first, again, random = (
        Trainer(config(sae=sae, W_dec_init=start), device="cpu")
        for start in (None, "whitened_rows", "random")
    )
    norms = random.sae.decoder_norms()
    untouched = random.sae.W_dec.detach().clone()
    for trainer in (first, again, random):
        trainer.initialise(ROWS.rows)
    assert torch.equal(random.sae.W_dec, untouched)
    W_dec = first.sae.W_dec.detach()
    assert torch.equal(W_dec, again.sae.W_dec) and torch.equal(W_dec.t(), first.sae.W_enc)
    assert torch.allclose(first.sae.decoder_norms(), norms)
    rows = whitened(first.sae.prepare(first.scaling.apply(ROWS.rows)) - first.sae.b_dec.detach())
    nearest = (normalize(W_dec, dim=1) @ rows.T).max(1)
    assert float(nearest.values.min()) > 0.95
    assert len(nearest.indices.unique()) > 0.9 * F
    assert not torch.equal(random.sae.W_dec.t(), first.sae.W_enc)


def test_whitened_rows_vary_alike_in_every_direction():
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -0.5, 0.5, 8
    )
    covariance = whitened(x).T @ whitened(x) / 4096
    assert relative_error(covariance, torch.eye(8) / 8) < 0.1
    assert torch.allclose(whitened(1e29 * x), whitened(x), atol=1e-3)
    assert torch.equal(whitened(0 * x), 0 * x)
    few = whitened(x[:4])  # fewer than D: no direction is blown up
    assert few.isfinite().all() and torch.allclose(few.norm(dim=1), torch.ones(4))


def test_rows_are_picked_apart():
    unit = normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    picked = apart(unit, 130, seed=0)
    assert torch.equal(picked, apart(unit, 130, seed=0))
    assert not torch.equal(picked, apart(unit, 130, seed=1))
    assert len(picked.unique(dim=0)) == 130  # each once
    assert len(torch.cat([picked, unit]).unique(dim=0)) == 300
    rows = torch.cat([unit[:1].expand(700, 8), unit])  # most of them the same
    alike = lambda found: int((found == unit[0]).all(1).sum())
    assert alike(apart(rows, 130, seed=0)) <= AT_ONCE < alike(apart(rows, 900, seed=0))


def test_latents_for_which_no_row_is_left_start_at_random():
    starts = ("whitened_rows", "random")
    near, random = (Trainer(config(W_dec_init=start), device="cpu") for start in starts)
    for trainer in (near, random):
        trainer.initialise(ROWS.rows[: F // 4])
    same = torch.isclose(near.sae.W_dec, random.sae.W_dec, atol=1e-6).all(dim=1)
    assert same.tolist() == [False] * (F // 4) + [True] * (F - F // 4)


def test_a_transcoder_starts_at_random():
    cfg = fastsae.TranscoderConfig(d_in=D, d_out=D, d_sae=F)
    assert config(sae=cfg).resolved(torch.device("cpu")).W_dec_init == "random"
    with pytest.raises(ValueError, match="W_dec_init must be 'random' for a transcoder"):
        config(sae=cfg, W_dec_init="whitened_rows")


@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in", "covariance_whitening"])
def test_a_run_goes_on_from_a_trained_sae(scaling):
    first = Trainer(config(sae=topk_config(normalize_activations=scaling)), device="cpu")
    sae = train(first)
    assert sae is not None
    second = Trainer(
        config(sae=topk_config(normalize_activations=scaling)), device="cpu", start=sae
    )
    second.initialise(ROWS.rows)
    x = ROWS.batch(0)
    loss = second.sae.loss(second.scaling.apply(x))
    assert relative_error(second.export()(x), sae(x)) < 1e-3
    assert loss.err.square().sum() < 0.7 * (
        Trainer(second.cfg, device="cpu").sae.loss(second.scaling.apply(x)).err.square().sum()
    )
    assert second.sae.cfg == second.cfg.sae


def test_a_start_must_fit():
    other = TopKSAE(topk_config(d_sae=2 * F))
    with pytest.raises(
        ValueError, match=r"start must have the parameter W_dec \[128, 16\] .*got \[256, 16\]"
    ):
        Trainer(config(), device="cpu", start=other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr_curve": "linear"}, r"lr_curve must be one of .*got 'linear'"),
        ({"lr_end": -1.0}, "lr_end must be at least 0"),
        ({"restart_cycles": 0}, "restart_cycles must be at least 1"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_a_wrong_option_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**changes)
    with pytest.raises(ValueError, match="b_dec_init must be one of"):
        config(b_dec_init="median")
    with pytest.raises(ValueError, match="W_dec_init must be one of"):
        config(W_dec_init="data")
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        config(data={"micro_batch_size": 0})


def test_checkpoints_at_multiples_are_kept(tmp_path):
    trainer = Trainer(
        config(60, checkpoint={"every": 5, "keep_every": 20}), device="cpu", out=tmp_path
    )
    train(trainer)
    found = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*"))
    assert found == [20, 40, 55, 60]


class TestSignals:
    def test_a_signal_ends_a_run_after_a_saved_step(self, tmp_path):
        trainer = Trainer(config(), device="cpu", out=tmp_path)

        def batches():
            for step, x in enumerate(ROWS.from_step(0)):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield x

        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped after step 6, saved in .*step-000000006"):
            trainer.fit(batches(), sample=ROWS.rows)
        assert signal.getsignal(signal.SIGTERM) == before
        resumed = Trainer(config(), device="cpu", out=tmp_path)
        assert resumed.resume() and resumed.steps_done == 6

    def test_without_a_folder_a_signal_acts_as_ever(self):
        def batches():
            for x in ROWS.from_step(0):
                yield x
                os.kill(os.getpid(), signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                Trainer(config(), device="cpu").fit(batches(), sample=ROWS.rows)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_the_command_exits_with_a_status_of_its_own(self, tmp_path):
        model = save_tiny_llama(tmp_path / "model")
        command = [sys.executable, "-m", "fastsae.cli", "train", "--out", str(tmp_path / "run")]
        command += ["--model", str(model), "--context-size", "64", "--d-sae", "64", "--k", "4"]
        command += ["--tokens", "100000000", "--harvest-tokens", "4096", "--batch-size", "64"]
        run = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
        assert run.returncode == EXIT_CODE, said
        assert b"go on with --resume" in said


class TestLegacyLoss:
    """The loss of the classic L1 recipes, written out."""

    def config(self, **changes):
        return LegacyStandardConfig(**{"d_in": D, "d_sae": F, "l1_coefficient": 0.02, **changes})

    def legacy(self, sae, x, dense_batch):
        acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        err = acts @ sae.W_dec + sae.b_dec - x
        mse = err.square()
        if dense_batch:
            mse = mse / ((x - x.mean(0)).norm(dim=1, keepdim=True) + 1e-6)
        return mse.mean() + sae.cfg.l1_coefficient * acts.sum(1).mean()

    @pytest.mark.parametrize("bias", [0.0, -0.5], ids=["dense", "sparse"])
    @pytest.mark.parametrize("normalization", [None, "dense_batch"])
    def test_value_and_gradient_on_the_sphere(self, normalization, bias):
        sae = SAES["legacy_standard"](self.config(mse_loss_normalization=normalization))
        with torch.no_grad():
            sae.b_enc.fill_(bias)
        x = ROWS.batch(0) - 2
        found = sae.loss(x)
        grads = torch.autograd.grad(found.total, list(sae.parameters()))
        expected = self.legacy(sae, x, normalization == "dense_batch")
        wanted = torch.autograd.grad(expected, list(sae.parameters()))
        assert relative_error(found.total.detach(), expected.detach()) < 1e-5
        assert relative_error(found.x_hat, sae(x).detach()) < 1e-4
        for (name, p), got, want in zip(sae.named_parameters(), grads, wanted, strict=True):
            if name == "W_dec":  # what is along a row is taken off before the step
                got, want = (g - (g * p).sum(1, keepdim=True) * p for g in (got, want))
            assert relative_error(got, want) < 1e-4, name

    def test_ghosts_stand_beside_a_mean_loss(self):
        sae = SAES["legacy_standard"](self.config(use_ghost_grads=True))
        x, dead = ROWS.batch(0) - 2, torch.arange(F) < 9
        found = sae.loss(x, dead)
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        ghost = ghost_loss(pre[:, :9].exp() @ sae.W_dec[:9], found.err) / len(x)
        assert relative_error(found.total, self.legacy(sae, x, False) + ghost) < 1e-5

    def test_it_is_used_and_saved_as_a_standard_sae(self, tmp_path):
        cfg = config(30, sae=self.config(), optimizer={"unit_norm_decoder": True})
        sae = Trainer(cfg, device="cpu").fit(ROWS.from_step(0), sample=ROWS.rows)
        assert type(sae.cfg) is StandardConfig
        assert sae.cfg.l1_coefficient == self.config().equivalent_l1_coefficient == 0.02 * D
        sae.save_model(tmp_path)
        x = ROWS.batch(0)
        assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))

    @pytest.mark.usefixtures("no_type_checker")
    def test_another_normalization_is_refused(self):
        with pytest.raises(ValueError, match="mse_loss_normalization must be 'dense_batch' or"):
            self.config(mse_loss_normalization="l2")
