"""A training run: its defaults, its bits, what a step does and counts."""

import math
from dataclasses import replace

import pytest
import torch

from fastsae import (
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
)
from fastsae.training import defaults
from fastsae.training.dead_latents import DeadLatents
from fastsae.training.scaling import AverageNorm
from fastsae.training.schedule import lr_factor
from parity import relative_error
from training_runs import (
    KINDS,
    ROWS,
    B,
    D,
    F,
    assert_same_bits,
    config,
    standard_config,
    state,
    topk_config,
    train,
)

CPU = torch.device("cpu")


class TestDefaults:
    @pytest.mark.parametrize(
        "tokens, device, batch_size",
        [
            (10_000, "cpu", 256),
            (1_000_000, "cpu", 1024),
            (10**8, "cpu", 2048),
            (10**8, "cuda", 8192),
        ],
    )
    def test_batch_size_leaves_enough_steps(self, tokens, device, batch_size):
        assert defaults.batch_size(torch.device(device), tokens) == batch_size

    def test_everything_left_at_none_is_resolved(self):
        cfg = TrainConfig(
            sae=topk_config(d_sae=4608 * 4), data=DataConfig(total_tokens=1_000_000)
        ).resolved(CPU)
        steps = 1_000_000 // 1024
        assert (cfg.data.batch_size, cfg.total_steps) == (1024, steps)
        assert cfg.optimizer.lr == pytest.approx(3e-3 / 2)
        assert cfg.schedule.warm_up_steps == steps // 16
        assert cfg.schedule.decay_steps == steps - steps // 16
        assert cfg.W_dec_init == "whitened_rows"
        cosine = replace(cfg, schedule=ScheduleConfig(lr_curve="cosine")).resolved(CPU)
        assert cosine.schedule.decay_steps == steps // 2
        assert cfg.dead_window == 100_000
        assert cfg.data.compute_dtype == "float32"

    @pytest.mark.parametrize(
        "device, sae, compute",
        [
            ("cpu", "float32", "float32"),
            ("cuda", "float32", "bfloat16"),
            ("cuda", "float64", "float64"),
            ("mps", "float32", "float32"),
        ],
    )
    def test_products_are_in_bfloat16_on_a_gpu(self, device, sae, compute):
        assert defaults.compute_dtype(torch.device(device), sae) == compute

    def test_long_runs_meet_the_ceilings(self):
        cfg = TrainConfig(sae=topk_config(), data=DataConfig(total_tokens=10**9)).resolved(CPU)
        assert cfg.schedule.warm_up_steps == 1000
        assert cfg.dead_window == 10_000_000

    def test_what_is_given_stays(self):
        schedule = ScheduleConfig(lr_end=0.1, warm_up_steps=0, decay_steps=0)
        cfg = TrainConfig(
            sae=topk_config(),
            data=DataConfig(
                total_tokens=1_000_000,
                batch_size=100,
                micro_batch_size=50,
                compute_dtype="bfloat16",
            ),
            dead_window=7,
            W_dec_init="random",
            optimizer=OptimizerConfig(lr=0.5),
            schedule=schedule,
        )
        assert cfg.resolved(CPU) == cfg

    def test_the_learning_rate_goes_up_stays_and_goes_down(self):
        factors = [lr_factor(step, 20, warm_up_steps=4, decay_steps=5) for step in range(20)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors[4:16] == [1.0] * 12
        assert factors[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
        assert lr_factor(0, 20, 0, 0) == lr_factor(19, 20, 0, 0) == 1.0


class TestBits:
    @pytest.mark.parametrize(
        "kind, sae",
        [("row_adam", topk_config()), ("adam", topk_config()), ("row_adam", standard_config())],
        ids=["row_adam-topk", "adam-topk", "row_adam-standard"],
    )
    def test_a_loss_curve_is_the_same_twice(self, kind, sae):
        curves = []
        for _ in range(2):
            trainer = Trainer(config(steps=300, kind=kind, sae=sae), device="cpu")
            trainer.initialise(ROWS.rows)
            curves.append([float(trainer.step(ROWS.batch(i)).total.detach()) for i in range(300)])
        assert curves[0] == curves[1]
        assert curves[0][-1] < 0.5 * curves[0][0]

    def test_another_seed_is_another_run(self):
        first, second = (Trainer(config(seed=seed), device="cpu").sae.W_enc for seed in (0, 1))
        assert not torch.equal(first, second)


class TestBadActivations:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_bad_value_is_refused_with_its_step_and_row(self, value):
        rows = [ROWS.batch(step).clone() for step in range(3)]
        rows[2][5, 3] = value
        trainer = Trainer(config(log={"every": 1}), device="cpu")
        message = "activations must be finite, got NaN or inf in 1 rows .* step 3, .* at row 5"
        with pytest.raises(ValueError, match=message):
            trainer.fit(rows)
        assert trainer.steps_done == 2
        assert all(p.isfinite().all() for p in trainer.sae.parameters())

    def test_a_bad_sample_is_refused(self):
        sample = ROWS.rows.clone()
        sample[10] = math.nan
        with pytest.raises(ValueError, match="activations must be finite, .* at row 10"):
            Trainer(config(), device="cpu").fit(ROWS.from_step(0), sample=sample)

    @pytest.mark.parametrize("every, newest", [(1, 9), (4, 8)])
    def test_a_bad_value_between_two_log_lines_reaches_no_checkpoint(self, every, newest, tmp_path):
        rows = [ROWS.batch(step).clone() for step in range(60)]
        rows[9][0, 0] = math.nan
        trainer = Trainer(config(checkpoint={"every": every}), device="cpu", out=tmp_path)
        with pytest.raises(ValueError, match="finite"):
            trainer.fit(rows)
        resumed = Trainer(config(), device="cpu", out=tmp_path)
        assert resumed.resume() and resumed.steps_done == newest
        assert all(p.isfinite().all() for p in resumed.sae.parameters())

    def test_a_loss_that_overflows_is_refused(self):
        cfg = config(log={"every": 1}, sae=topk_config(normalize_activations="none"))
        with pytest.raises(ValueError, match="loss must be finite, got inf at step 1; lower lr"):
            Trainer(cfg, device="cpu").fit(
                [torch.full((B, D), 1e30).index_fill(0, torch.tensor([0]), 1)]
            )

    def test_batches_that_end_too_early_are_refused(self):
        with pytest.raises(ValueError, match="batches must last for 60 steps, got 3"):
            Trainer(config(), device="cpu").fit([ROWS.batch(step) for step in range(3)])


class TestDeadLatents:
    def test_tokens_since_a_latent_fired_are_counted(self):
        dead = DeadLatents(3, window=100, device=CPU)
        dead.update(torch.tensor([0, 1, 64]), 64)
        dead.update(torch.tensor([0, 0, 2]), 36)
        assert dead.since_fired.tolist() == [100, 36, 0]
        assert dead.dead().tolist() == [False, False, False]
        dead.update(torch.tensor([0, 0, 0]), 1)
        assert dead.dead().tolist() == [True, False, False]
        assert (dead.fired.tolist(), dead.tokens) == ([0, 1, 66], 101)

    def test_auxk_acts_on_dead_latents_and_then_only(self):
        trainer = Trainer(config(dead_window=10 * B), device="cpu")
        trainer.initialise(ROWS.rows)
        n_dead, auxk = [], []
        for step in range(30):
            n_dead.append(int(trainer.dead.dead().sum()))
            auxk.append(float(trainer.step(ROWS.batch(step)).terms["auxk"]))
        assert n_dead[:11] == [0] * 11 and n_dead[11] > 0
        assert [value > 0 for value in auxk] == [n > 0 for n in n_dead]

    def test_a_latent_that_fires_again_is_alive(self):
        trainer = Trainer(config(), device="cpu")
        trainer.initialise(ROWS.rows)
        trainer.dead.since_fired.fill_(10**6)
        loss = trainer.step(ROWS.batch(0))
        assert torch.equal(trainer.dead.dead(), loss.counts == 0)

    def test_log_sparsity_is_the_logarithm_of_the_firing_frequency(self):
        trainer = Trainer(config(), device="cpu")
        counts = [trainer.step(ROWS.batch(step)).counts for step in range(5)]
        expected = torch.log10(torch.stack(counts).sum(0) / (5 * B) + 1e-10)
        assert torch.allclose(trainer.log_sparsity(), expected)
        assert float(trainer.log_sparsity().min()) == pytest.approx(-10)


class TestStep:
    @pytest.mark.parametrize("kind", KINDS)
    def test_clipping_bounds_the_global_norm(self, kind):
        norms = {}
        for clip in (None, 0.01, 1e6):
            trainer = Trainer(config(kind=kind, optimizer={"clip_norm": clip}), device="cpu")
            trainer.initialise(ROWS.rows)
            trainer.step(ROWS.batch(0))
            moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.sae.parameters()]
            # The first moment after one step is a tenth of the gradient.
            norms[clip] = 10 * float(torch.cat([m.flatten() for m in moments]).norm())
        assert norms[None] > 0.1
        assert norms[1e6] == pytest.approx(norms[None], rel=1e-5)
        assert norms[0.01] == pytest.approx(0.01, rel=1e-3)

    def test_both_optimizers_give_the_same_weights(self):
        found = []
        for kind in KINDS:
            trainer = Trainer(config(kind=kind), device="cpu")
            trainer.initialise(ROWS.rows)
            for step in range(8):
                trainer.step(ROWS.batch(step))
            found.append(trainer.sae.state_dict())
        for name, value in found[0].items():
            assert relative_error(value, found[1][name]) < 1e-4, name

    @pytest.mark.parametrize("kind", KINDS)
    def test_copies_for_the_products_are_the_weights_rounded_after_every_step(self, kind):
        trainer = Trainer(config(kind=kind, data={"compute_dtype": "bfloat16"}), device="cpu")
        copies = dict(trainer.sae.compute_copies)
        assert set(copies) == {"W_enc", "W_dec"}
        for step in range(3):
            trainer.step(ROWS.rows[step * B : (step + 1) * B])
            for name, copy in copies.items():
                weight = getattr(trainer.sae, name)
                assert copy.stride() == weight.stride()
                assert torch.equal(copy, weight.bfloat16())
        assert trainer.export().compute_copies == {}

    def test_bfloat16_products_move_float32_weights_about_the_same(self):
        losses = {}
        for dtype in ("float32", "bfloat16"):
            trainer = Trainer(config(data={"compute_dtype": dtype}), device="cpu")
            trainer.initialise(ROWS.rows)
            losses[dtype] = [float(trainer.step(ROWS.batch(i)).terms["mse"]) for i in range(20)]
            assert {p.dtype for p in trainer.sae.parameters()} == {torch.float32}
        assert losses["bfloat16"] != losses["float32"]
        assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)

    def test_initialise_scales_rows_to_norm_root_d_and_centres_them(self):
        trainer = Trainer(config(), device="cpu")
        trainer.initialise(ROWS.rows)
        scaled = ROWS.rows * factor_of(trainer)
        assert float(scaled.norm(dim=1).mean()) == pytest.approx(math.sqrt(D), rel=1e-5)
        assert torch.allclose(trainer.sae.b_dec, scaled.mean(0), atol=1e-6)

    def test_the_learning_rate_follows_its_schedule(self):
        schedule = {"warm_up_steps": 2, "decay_steps": 4}
        trainer = Trainer(config(8, optimizer={"lr": 1.0}, schedule=schedule), device="cpu")
        rates = []
        for step in range(8):
            trainer.step(ROWS.batch(step))
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])

    def test_metrics_are_their_formulas(self):
        trainer, lines = Trainer(config(steps=1), device="cpu"), []
        untrained = Trainer(config(steps=1), device="cpu")
        x = ROWS.batch(0)
        trainer.fit([x], progress=lines.append)
        untrained.initialise(x)
        x = x * factor_of(untrained)
        error = untrained.sae(x).detach() - x
        spread = (x - x.mean(0)).square().sum()
        (line,) = lines
        assert line == trainer.metrics
        assert line["fvu"] == pytest.approx(float(error.square().sum() / spread), rel=1e-5)
        assert line["mse"] == line["loss"] == pytest.approx(float(error.square().sum(1).mean()))
        assert line["l0"] == float((untrained.sae.encode(x) != 0).sum()) / B
        assert (line["step"], line["tokens"], line["dead"]) == (1, B, 0)


class TestExport:
    @pytest.mark.parametrize(
        "sae",
        [topk_config(), topk_config(rescale_acts_by_decoder_norm=False), standard_config()],
        ids=["topk", "topk-unscaled", "standard"],
    )
    def test_it_takes_rows_as_they_are(self, sae):
        trainer = Trainer(config(sae=sae), device="cpu")
        exported = train(trainer)
        assert exported is not None
        before, x = state(trainer), ROWS.batch(0)
        expected = trainer.sae(x * factor_of(trainer)) / factor_of(trainer)
        assert abs(factor_of(trainer) - 1) > 0.1
        assert relative_error(exported(x).detach(), expected.detach()) < 1e-5
        assert exported.cfg.normalize_activations == "none"
        assert_same_bits(state(trainer), before)

    @pytest.mark.parametrize("sae", [topk_config(), standard_config()], ids=["topk", "standard"])
    def test_decoder_rows_have_norm_one(self, sae):
        exported = train(Trainer(config(sae=sae), device="cpu"))
        assert exported is not None
        assert torch.allclose(exported.decoder_norms(), torch.ones(F), atol=1e-6)


def factor_of(trainer):
    assert isinstance(trainer.scaling, AverageNorm)
    return trainer.scaling.factor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_pinned_rows_to_travel():
    trainer = Trainer(config(), device="cuda")
    rows = ROWS.batch(0).bfloat16().pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = trainer._here(rows, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), rows.float())
