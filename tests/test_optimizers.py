"""Every kind of optimizer: its rule written out, its state on disk, the narrow forms of Adam's."""

import math

import pytest
import torch

from fastsae import SAES, OptimizerConfig, Trainer
from fastsae.training import defaults
from fastsae.training.narrow_state import MOMENTS, new_moments
from fastsae.training.resampling import resample
from parity import relative_error
from training_runs import ROWS, D, F, assert_same_bits, config, state, topk_config, train

NARROW = {
    "bfloat16 moments": {"moments": "bfloat16"},
    "8-bit moments": {"moments": "8bit"},
    "signum": {"kind": "signum"},
    "muon": {"kind": "muon", "lr": 1.5e-2},
}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")


def in_order(options):
    muon = options.get("kind") == "muon"
    return pytest.param(options, marks=[needs_muon] if muon else [])


def stepped(n=1, **options):
    """A trainer after n steps, and the parameters before each."""
    trainer = Trainer(config(optimizer={"clip_norm": None, **options}), device="cpu")
    trainer.initialise(ROWS.rows)
    for step in range(n):
        trainer.step(ROWS.batch(step))
    return trainer


def gradients(trainer, step):
    """Of the next batch, by plain autograd."""
    sae = SAES["topk"](trainer.sae.cfg)
    sae.load_state_dict(trainer.sae.state_dict())
    x = trainer.scaling.apply(ROWS.batch(step))
    sae.loss(x, trainer.dead.dead()).total.backward()
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [in_order(options) for options in NARROW.values()], ids=NARROW)
def test_it_learns_and_a_resumed_run_has_its_bits(options, tmp_path):
    cfg = config(60, optimizer=options, checkpoint={"every": 10})
    whole = Trainer(cfg, device="cpu", out=tmp_path / "whole")
    train(whole)
    train(Trainer(cfg, device="cpu", out=tmp_path / "parts"), stop_before=37)
    resumed = Trainer(cfg, device="cpu", out=tmp_path / "parts")
    assert resumed.resume() and resumed.steps_done == 30
    train(resumed)
    as_floats = lambda found: {k: t.float() if t.itemsize == 1 else t for k, t in found.items()}
    assert_same_bits(as_floats(state(resumed)), as_floats(state(whole)))
    plain = Trainer(config(60), device="cpu")
    train(plain)
    assert whole.metrics["fvu"] < 1.3 * plain.metrics["fvu"]


class TestSignum:
    def test_every_element_moves_by_the_rate(self):
        trainer = stepped(1, kind="signum")
        moments, before = {}, {}
        for step in (1, 2, 3):
            found = gradients(trainer, step)
            for name, p in trainer.sae.named_parameters():
                moment = trainer.optimizer.state[p]["exp_avg"]
                moments[name] = 0.9 * moment + 0.1 * found[name]
                before[name] = p.detach().clone()
            trainer.step(ROWS.batch(step))
            lr = trainer.optimizer.param_groups[0]["lr"]
            for name, p in trainer.sae.named_parameters():
                sure = moments[name].abs() > 1e-6
                want = before[name] - lr * moments[name].sign()
                assert torch.allclose(p[sure], want[sure], atol=1e-7), name

    def test_its_default_rate_is_a_tenth(self):
        assert defaults.learning_rate(4608, "signum") == pytest.approx(3e-4)
        assert defaults.learning_rate(4608, "adam") == 3e-3


@needs_muon
class TestMuon:
    def test_matrices_are_stepped_by_torchs_muon_and_biases_by_adam(self):
        trainer = stepped(0, kind="muon")
        found = gradients(trainer, 0)
        weights = {n: p.detach().clone() for n, p in trainer.sae.named_parameters()}
        trainer.step(ROWS.batch(0))
        lr = trainer.optimizer.param_groups[0]["lr"]
        for name in ("W_enc", "W_dec"):
            p = torch.nn.Parameter(weights[name].clone())
            p.grad = found[name]
            torch.optim.Muon([p], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
            moved, want = getattr(trainer.sae, name) - weights[name], p - weights[name]
            assert relative_error(moved.detach(), want.detach()) < 0.02, name  # in bf16 inside
        moved = trainer.sae.b_dec.detach() - weights["b_dec"]
        assert torch.allclose(moved, -lr * found["b_dec"].sign(), atol=1e-6)

    def test_an_older_torch_is_refused(self, monkeypatch):
        monkeypatch.delattr(torch.optim, "Muon")
        with pytest.raises(ImportError, match=r"kind 'muon' needs torch 2\.9 or newer, got"):
            Trainer(config(kind="muon"), device="cpu")


class TestNarrowState:
    @pytest.mark.parametrize("moments, tolerance", [("bfloat16", 0.02), ("8bit", 0.2)])
    def test_a_moment_after_a_step_is_adams_to_its_precision(self, moments, tolerance):
        narrow, wide = stepped(1, moments=moments), stepped(1)
        for name in ("W_enc", "W_dec"):
            ours = narrow.optimizer.state[getattr(narrow.sae, name)]
            theirs = wide.optimizer.state[getattr(wide.sae, name)]
            axis = 0 if name == "W_enc" else 1
            for moment in MOMENTS:
                want, got = theirs[moment], ours[moment].float()
                if moments == "8bit":
                    got = got * ours[f"{moment}_scale"].unsqueeze(axis)
                largest = want.abs().amax(axis, keepdim=True)
                there = want.abs() > 1e-3 * largest
                assert ((got - want)[there].abs() < 1.3 * tolerance * want[there].abs()).all()
            same = relative_error(getattr(narrow.sae, name), getattr(wide.sae, name).detach())
            assert same < 1e-5  # the first step reads no stored moment
        for bias in (narrow.sae.b_enc, narrow.sae.b_dec):
            assert narrow.optimizer.state[bias]["exp_avg"].dtype == torch.float32

    def test_bytes_an_element(self):
        W_enc = torch.zeros(F, D).t()
        for kind, itemsize in {"float32": 4, "bfloat16": 2, "8bit": 1}.items():
            found = new_moments(W_enc, kind)
            assert {found[name].itemsize for name in MOMENTS} == {itemsize}
            assert {found[name].stride() for name in MOMENTS} == {W_enc.stride()}

    def test_8_bits_are_right_on_average_and_a_second_moment_is_never_lost(self):
        from fastsae.training.narrow_state import _in_8_bits
        from fastsae_kernels.optimizer.rounding import hash_bits

        values = torch.logspace(-5, 0, 64).expand(512, 64).contiguous()
        bits = hash_bits(torch.arange(512), 64, step=3) & 0xFFFF
        for name, dtype in MOMENTS.items():
            scaled = values * torch.finfo(dtype).max
            got = _in_8_bits(scaled, dtype, bits).float()
            normal = scaled[0] > 8 * torch.finfo(dtype).smallest_normal
            error = (got.mean(0) / scaled[0] - 1).abs()[normal]
            assert error.max() < 0.03, name
            assert (got[:, normal] != scaled[:, normal]).any()
        least = torch.full((1, 4), 1e-12)
        kept = _in_8_bits(least, MOMENTS["exp_avg_sq"], torch.zeros(1, 4, dtype=torch.int64))
        assert (kept.float() > 0).all()

    def test_bf16_masters_move_where_rounding_to_nearest_keeps_them(self):
        moved = {}
        for rounding in ("nearest", "stochastic"):
            cfg = config(
                sae=topk_config(dtype="bfloat16"),
                optimizer={"rounding": rounding, "lr": 2e-5, "clip_norm": None},
            )
            trainer = Trainer(cfg, device="cpu")
            trainer.initialise(ROWS.rows)
            before = trainer.sae.W_dec.detach().clone()
            for step in range(8):
                trainer.step(ROWS.batch(step))
            assert trainer.sae.W_dec.dtype == torch.bfloat16
            moved[rounding] = float((trainer.sae.W_dec != before).float().mean())
        assert moved["stochastic"] > 2 * moved["nearest"]

    def test_unit_rows_stay_units(self):
        trainer = stepped(3, moments="8bit", unit_norm_decoder=True)
        assert torch.allclose(trainer.sae.decoder_norms(), torch.ones(F), atol=1e-6)


class TestResampling:
    def test_dead_latents_start_from_badly_reconstructed_rows(self):
        trainer = stepped(5)
        trainer.dead.since_fired[:9] = 10**6
        loss = trainer.step(ROWS.batch(5))
        dead = torch.arange(F) < 9
        before = {n: p.detach().clone() for n, p in trainer.sae.named_parameters()}
        latents = resample(trainer.sae, trainer.optimizer, loss, dead, seed=1)
        assert latents.tolist() == list(range(9))
        sae = trainer.sae
        centred = loss.x - sae.b_dec
        cosine = torch.cosine_similarity(sae.W_dec[:9, None], centred[None], dim=-1)
        assert (cosine.max(1).values > 1 - 1e-5).all()
        assert len(set(cosine.argmax(1).tolist())) == 9, "no row twice"
        norms = before["W_dec"][9:].norm(dim=1).mean(), before["W_enc"][:, 9:].norm(dim=0).mean()
        assert torch.allclose(sae.W_dec[:9].norm(dim=1), norms[0].expand(9), rtol=1e-4)
        assert torch.allclose(sae.W_enc[:, :9].norm(dim=0), 0.2 * norms[1].expand(9), rtol=1e-4)
        assert (sae.b_enc[:9] == 0).all()
        assert torch.equal(sae.W_dec[9:], before["W_dec"][9:])
        moments = trainer.optimizer.state[sae.W_enc]
        assert (moments["exp_avg"][:, :9] == 0).all() and (moments["exp_avg"][:, 9:] != 0).any()

    def test_worse_rows_are_drawn_more_often(self):
        trainer = stepped(5)
        loss = trainer.step(ROWS.batch(5))
        with torch.no_grad():
            loss.err[0] *= 20
        dead = torch.arange(F) == 3
        drawn = 0
        for seed in range(20):
            resample(trainer.sae, trainer.optimizer, loss, dead, seed)
            direction = loss.x[0] - trainer.sae.b_dec
            drawn += torch.cosine_similarity(trainer.sae.W_dec[3], direction, dim=0) > 0.999
        assert drawn > 15

    @pytest.mark.parametrize("options", [{}, {"moments": "8bit"}], ids=["float32", "8bit"])
    def test_a_run_resamples_in_its_first_half_to_the_same_bits_twice(self, options, monkeypatch):
        runs, seeds = [], []
        noted = lambda *args: (seeds.append(args[-1]), resample(*args))[1]
        monkeypatch.setattr("fastsae.training.update.resample", noted)
        for _ in range(2):
            cfg = config(
                40,
                sae=topk_config(aux_loss_coefficient=0.0),
                optimizer=options,
                W_dec_init="random",
                resample_every=15,
                log={"every": 1},
            )
            trainer, lines = Trainer(cfg, device="cpu"), []
            trainer.fit(ROWS.from_step(0), sample=ROWS.rows, progress=lines.append)
            runs.append((trainer.sae.W_dec.detach().clone(), [line["dead"] for line in lines]))
        assert torch.equal(runs[0][0], runs[1][0])
        assert seeds == [15, 15], "the seed of seed 0 is the step; step 30 is in the second half"
        dead = runs[0][1]
        assert dead[13] > 0 and dead[14] == 0
        assert math.isfinite(float(runs[0][0].sum()))

    def test_a_batch_without_error_or_dead_latents_changes_nothing(self):
        trainer = stepped(2)
        loss = trainer.step(ROWS.batch(2))
        nobody = torch.zeros(F, dtype=torch.bool)
        assert len(resample(trainer.sae, trainer.optimizer, loss, nobody, 0)) == 0
        assert len(resample(trainer.sae, trainer.optimizer, loss, ~nobody, 0)) == 0
        loss.err.zero_()
        assert len(resample(trainer.sae, trainer.optimizer, loss, torch.arange(F) < 3, 0)) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "sgd"}, r"kind must be one of \['row_adam', .*\], got 'sgd'"),
        ({"moments": "int4"}, "moments must be one of .*, got 'int4'"),
        ({"kind": "adam", "moments": "8bit"}, "for every kind but 'row_adam', got '8bit'"),
        ({"kind": "muon", "rounding": "stochastic"}, "got 'float32' and 'stochastic' for 'muon'"),
    ],
    ids=["kind", "moments", "moments of adam", "rounding of muon"],
)
@pytest.mark.usefixtures("no_type_checker")
def test_an_optimizer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_a_resampling_out_of_range_is_refused():
    with pytest.raises(ValueError, match="resample_every must be at least 1 or None, got 0"):
        config(resample_every=0)
