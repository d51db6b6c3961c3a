"""A training run: its defaults, its bits, what it counts, and what survives a kill."""

import json
import math
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastsae import OptimizerConfig, StandardConfig, TopKConfig, TrainConfig, Trainer
from fastsae.data.batches import ShuffledRows
from fastsae.training import defaults
from fastsae.training.dead_latents import DeadLatents
from fastsae.training.log import RunLog, read_log
from fastsae.training.optimizer import lr_factor
from parity import relative_error

D, F, K, B = 16, 128, 4, 64
CLOCK = ("seconds", "tokens_per_second")
KINDS = ("row_adam", "adam")
CPU = torch.device("cpu")


def sparse_rows(n=1000, seed=0):
    """Rows made of a few of 40 directions, off centre."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=g)
    strengths = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.08)
    return 5 * strengths @ directions + 0.01 * torch.randn(n, D, generator=g) + 2


def topk_config(**changes):
    shape = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
    return TopKConfig(**{**shape, "k": K, **changes})


def standard_config(**changes):
    shape = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
    return StandardConfig(**{**shape, "l1_coefficient": 0.5, **changes})


def config(steps=60, kind="row_adam", sae=None, optimizer=None, **changes: Any):
    values = {
        "sae": sae or topk_config(),
        "total_tokens": steps * B,
        "batch_size": B,
        "dead_window": 10 * B,
        "log_every": 7,
        "optimizer": OptimizerConfig(**{"kind": kind, "lr": 3e-3, **(optimizer or {})}),
    }
    return TrainConfig(**{**values, **changes})


def train(trainer, stop_before=None):
    """Go on from where the trainer is; the export, or None where it stopped before a step."""

    def batches():
        for step, x in enumerate(ROWS.from_step(trainer.steps_done), trainer.steps_done):
            if step == stop_before:
                raise KeyboardInterrupt
            yield x

    try:
        return trainer.fit(batches(), sample=ROWS.rows)
    except KeyboardInterrupt:
        return None


def state(trainer):
    """Every tensor and number that the next step depends on."""
    found = {name: t.detach().clone() for name, t in trainer.sae.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    found |= {f"dead.{name}": t for name, t in trainer.dead.state_dict().items()}
    return found | {"counters": torch.tensor([trainer.steps_done, trainer.scale]).double()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert different == []


def timeless(path):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(path)]


ROWS = ShuffledRows(sparse_rows(), B, seed=3)


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
        cfg = TrainConfig(sae=topk_config(d_sae=4608 * 4), total_tokens=1_000_000).resolved(CPU)
        steps = 1_000_000 // 1024
        assert (cfg.batch_size, cfg.total_steps) == (1024, steps)
        assert cfg.optimizer.lr == pytest.approx(3e-3 / 2)
        assert cfg.optimizer.warm_up_steps == steps // 16
        assert cfg.optimizer.decay_steps == steps // 2
        assert cfg.dead_window == 100_000
        assert cfg.compute_dtype == "float32"

    @pytest.mark.parametrize(
        "device, sae, compute",
        [
            ("cpu", "float32", "float32"),
            ("cuda", "float32", "bfloat16"),
            ("cuda", "float64", "float64"),
        ],
    )
    def test_products_are_in_bfloat16_on_a_gpu(self, device, sae, compute):
        assert defaults.compute_dtype(torch.device(device), sae) == compute

    def test_long_runs_meet_the_ceilings(self):
        cfg = TrainConfig(sae=topk_config(), total_tokens=10**9).resolved(CPU)
        assert cfg.optimizer.warm_up_steps == 1000
        assert cfg.dead_window == 10_000_000

    def test_what_is_given_stays(self):
        optimizer = OptimizerConfig(lr=0.5, warm_up_steps=0, decay_steps=0)
        cfg = TrainConfig(
            sae=topk_config(),
            total_tokens=1_000_000,
            batch_size=100,
            dead_window=7,
            compute_dtype="bfloat16",
            optimizer=optimizer,
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

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sae", [topk_config(), standard_config()], ids=["topk", "standard"])
    def test_a_resumed_run_ends_like_one_never_stopped(self, kind, sae, tmp_path):
        cfg = config(kind=kind, sae=sae, checkpoint_every=10)
        whole = Trainer(cfg, device="cpu", out=tmp_path / "whole")
        train(whole)
        train(Trainer(cfg, device="cpu", out=tmp_path / "parts"), stop_before=37)
        resumed = Trainer(cfg, device="cpu", out=tmp_path / "parts")
        assert resumed.resume() and resumed.steps_done == 30
        train(resumed)
        assert_same_bits(state(resumed), state(whole))
        assert resumed.sae.W_enc.stride() == (1, D)
        logs = [timeless(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole")]
        assert logs[0] == logs[1]
        assert [line["step"] for line in logs[1]] == [1, 7, 14, 21, 28, 35, 42, 49, 56, 60]

    def test_a_topk_run_that_is_resumed_has_dead_latents(self, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        lines = timeless(tmp_path / "metrics.jsonl")
        assert any(line["dead"] > 0 and line["auxk"] > 0 for line in lines)

    @pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
    def test_a_run_killed_at_any_moment_ends_like_one_never_killed(self, tmp_path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "fastsae", "pytest"])
        moment, kills, exitcode = random.Random(0), 0, None
        train_in_this_process(tmp_path / "whole")
        while exitcode != 0:
            process = context.Process(target=train_in_this_process, args=(tmp_path / "killed",))
            process.start()
            if kills < 6:
                wait_for_training(tmp_path / "killed")
                time.sleep(moment.uniform(0.0, 0.3))
                process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -9)
            kills += exitcode == -9
        assert kills >= 3
        found, expected = (saved_run(tmp_path / name) for name in ("killed", "whole"))
        assert_same_bits(found[0], expected[0])
        assert found[1] == expected[1]


KILLED_STEPS = 120


def train_in_this_process(out):
    torch.set_num_threads(1)
    cfg = config(steps=KILLED_STEPS, checkpoint_every=3)
    trainer = Trainer(cfg, device="cpu", out=out)
    trainer.resume()
    train(trainer)


def wait_for_training(out):
    """Until another checkpoint than the newest one is written."""
    folder = out / "checkpoints"
    found = set(folder.glob("step-*"))
    deadline = time.monotonic() + 5
    while not set(folder.glob("step-*")) - found and time.monotonic() < deadline:
        time.sleep(0.005)


def saved_run(out):
    path = out / "checkpoints" / f"step-{KILLED_STEPS:09d}"
    files = ("sae_weights.safetensors", "trainer_state.safetensors")
    tensors = {k: v for name in files for k, v in load_file(path / name).items()}
    return tensors, timeless(out / "metrics.jsonl")


class TestCheckpoints:
    def test_the_newest_are_kept(self, tmp_path):
        train(Trainer(config(checkpoint_every=25, keep_checkpoints=2), device="cpu", out=tmp_path))
        names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert names == ["step-000000050", "step-000000060"]

    def test_one_is_written_at_the_end_without_checkpoint_every(self, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000060"]

    def test_nothing_is_written_without_out(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer = Trainer(config(checkpoint_every=1), device="cpu")
        train(trainer)
        assert list(tmp_path.iterdir()) == []
        assert not trainer.resume()
        with pytest.raises(ValueError, match="out must be a folder to save a checkpoint, got None"):
            trainer.save()

    def test_an_empty_folder_has_nothing_to_resume(self, tmp_path):
        assert not Trainer(config(), device="cpu", out=tmp_path).resume()

    def test_a_new_run_in_the_folder_of_another_is_refused(self, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        with pytest.raises(FileExistsError, match="out must be a folder without checkpoints, got"):
            train(Trainer(config(), device="cpu", out=tmp_path))

    def test_a_finished_run_resumes_with_its_metrics(self, tmp_path):
        first = Trainer(config(), device="cpu", out=tmp_path)
        train(first)
        again = Trainer(config(), device="cpu", out=tmp_path)
        assert again.resume()
        assert again.metrics == first.metrics

    def test_what_a_kill_left_is_removed_and_files_are_for_everyone_to_read(self, tmp_path):
        stale = tmp_path / "checkpoints" / ".step-000000001.abcd"
        stale.mkdir(parents=True)
        path = tmp_path / "ordinary"
        path.touch()
        train(Trainer(config(), device="cpu", out=tmp_path))
        assert not stale.exists()
        saved = list((tmp_path / "checkpoints").glob("step-*/*"))
        assert {p.stat().st_mode for p in saved} == {path.stat().st_mode}

    def test_a_checkpoint_before_the_first_step_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="steps_done must be at least 1 to save a checkpoint"):
            Trainer(config(), device="cpu", out=tmp_path).save()

    @pytest.mark.parametrize(
        "changes, named",
        [
            ({"seed": 1}, "seed: 0 then, 1 now"),
            ({"steps": 61}, f"total_tokens: {60 * B} then, {61 * B} now"),
            ({"kind": "adam"}, "optimizer: "),
            ({"sae": topk_config(k=5)}, "sae: "),
            ({"sae": standard_config()}, "architecture: 'topk' then, 'standard' now; "),
            ({"batch_size": 2 * B}, f"batch_size: {B} then, {2 * B} now"),
        ],
        ids=["seed", "total_tokens", "optimizer", "sae", "variant", "batch_size"],
    )
    def test_resuming_with_another_config_is_refused(self, changes, named, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        other = Trainer(config(**changes), device="cpu", out=tmp_path)
        message = "config must be the checkpoint's to resume, got other values of "
        with pytest.raises(ValueError, match=message) as caught:
            other.resume()
        assert named in str(caught.value)
        assert other.steps_done == 0

    def test_how_often_to_log_and_save_may_change(self, tmp_path):
        train(Trainer(config(checkpoint_every=10), device="cpu", out=tmp_path), stop_before=30)
        cfg = config(log_every=1, checkpoint_every=5, keep_checkpoints=9)
        assert Trainer(cfg, device="cpu", out=tmp_path).resume()

    @pytest.mark.parametrize(
        "name", ["trainer_state.json", "trainer_state.safetensors", "sae_weights.safetensors"]
    )
    def test_a_damaged_checkpoint_is_refused(self, name, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        path = tmp_path / "checkpoints" / "step-000000060" / name
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(ValueError, match="step-000000060.* is truncated or damaged"):
            Trainer(config(), device="cpu", out=tmp_path).resume()

    @pytest.mark.parametrize("name", ["trainer_state.json", "trainer_state.safetensors"])
    def test_a_checkpoint_without_a_file_is_refused(self, name, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        (tmp_path / "checkpoints" / "step-000000060" / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"path must be a checkpoint with {name}, got"):
            Trainer(config(), device="cpu", out=tmp_path).resume()


class TestBadActivations:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_bad_value_is_refused_with_its_step_and_row(self, value):
        rows = [ROWS.batch(step).clone() for step in range(3)]
        rows[2][5, 3] = value
        trainer = Trainer(config(log_every=1), device="cpu")
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
        trainer = Trainer(config(checkpoint_every=every), device="cpu", out=tmp_path)
        with pytest.raises(ValueError, match="finite"):
            trainer.fit(rows)
        resumed = Trainer(config(), device="cpu", out=tmp_path)
        assert resumed.resume() and resumed.steps_done == newest
        assert all(p.isfinite().all() for p in resumed.sae.parameters())

    def test_a_loss_that_overflows_is_refused(self):
        cfg = config(log_every=1, sae=topk_config(normalize_activations="none"))
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

    def test_bfloat16_products_move_float32_weights_about_the_same(self):
        losses = {}
        for dtype in ("float32", "bfloat16"):
            trainer = Trainer(config(compute_dtype=dtype), device="cpu")
            trainer.initialise(ROWS.rows)
            losses[dtype] = [float(trainer.step(ROWS.batch(i)).terms["mse"]) for i in range(20)]
            assert {p.dtype for p in trainer.sae.parameters()} == {torch.float32}
        assert losses["bfloat16"] != losses["float32"]
        assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)

    def test_initialise_scales_rows_to_norm_root_d_and_centres_them(self):
        trainer = Trainer(config(), device="cpu")
        trainer.initialise(ROWS.rows)
        scaled = ROWS.rows * trainer.scale
        assert float(scaled.norm(dim=1).mean()) == pytest.approx(math.sqrt(D), rel=1e-5)
        assert torch.allclose(trainer.sae.b_dec, scaled.mean(0), atol=1e-6)

    def test_the_learning_rate_follows_its_schedule(self):
        optimizer = {"warm_up_steps": 2, "decay_steps": 4, "lr": 1.0}
        trainer = Trainer(config(steps=8, optimizer=optimizer), device="cpu")
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
        x = x * untrained.scale
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
        expected = trainer.sae(x * trainer.scale) / trainer.scale
        assert abs(trainer.scale - 1) > 0.1
        assert relative_error(exported(x).detach(), expected.detach()) < 1e-5
        assert exported.cfg.normalize_activations == "none"
        assert_same_bits(state(trainer), before)

    @pytest.mark.parametrize("sae", [topk_config(), standard_config()], ids=["topk", "standard"])
    def test_decoder_rows_have_norm_one(self, sae):
        exported = train(Trainer(config(sae=sae), device="cpu"))
        assert exported is not None
        assert torch.allclose(exported.decoder_norms(), torch.ones(F), atol=1e-6)


class TestShuffledRows:
    def test_an_epoch_visits_every_row_once(self):
        batches = ShuffledRows(torch.arange(90.0)[:, None], 10, seed=5)
        seen = torch.cat([batches.batch(step) for step in range(9)]).flatten()
        assert seen.sort().values.tolist() == list(range(90))
        assert seen.tolist() != list(range(90))

    def test_the_end_of_an_epoch_is_filled_from_the_next(self):
        batches = ShuffledRows(torch.arange(25.0)[:, None], 10, seed=5)
        seen = torch.cat([batches.batch(step) for step in range(5)]).flatten()
        first, second = seen[:25].tolist(), seen[25:].tolist()
        assert sorted(first) == sorted(second) == list(range(25))
        assert first != second

    def test_a_batch_is_a_function_of_seed_and_step_alone(self):
        rows = torch.arange(25.0)[:, None]
        in_order = [ShuffledRows(rows, 10, seed=5).batch(step) for step in range(8)]
        batches = ShuffledRows(rows, 10, seed=5)
        for step in (7, 0, 3, 3, 6):
            assert torch.equal(batches.batch(step), in_order[step])
        iterator = batches.from_step(4)
        assert all(torch.equal(next(iterator), in_order[step]) for step in (4, 5, 6))
        assert not torch.equal(ShuffledRows(rows, 10, seed=6).batch(0), in_order[0])

    @pytest.mark.parametrize("batch_size", [0, 26])
    def test_a_batch_size_out_of_range_is_refused(self, batch_size):
        with pytest.raises(
            ValueError, match=r"batch_size must be in \[1, N\] with N = 25 rows, got"
        ):
            ShuffledRows(torch.zeros(25, 2), batch_size)


class TestLog:
    def test_a_line_cut_short_is_left_out_and_truncate_removes_it(self, tmp_path):
        log = RunLog(tmp_path / "run" / "metrics.jsonl")
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.1 * step})
        path = log.path or Path()
        with path.open("a") as file:
            file.write('{"step": 4, "lo')
        assert [line["step"] for line in read_log(path)] == [1, 2, 3]
        log.truncate(2)
        log.write({"step": 3})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3}]


BAD_RUNS = {
    "total_tokens must be at least 1, got 0": {"total_tokens": 0},
    "log_every must be at least 1, got 0": {"log_every": 0},
    "keep_checkpoints must be at least 1, got 0": {"keep_checkpoints": 0},
    "batch_size must be at least 1 or None, got 0": {"batch_size": 0},
    "dead_window must be at least 1 or None, got -1": {"dead_window": -1},
    "checkpoint_every must be at least 1 or None, got 0": {"checkpoint_every": 0},
    "compute_dtype must name a floating torch dtype or be None, got 'half8'": {
        "compute_dtype": "half8"
    },
}


@pytest.mark.parametrize("message", BAD_RUNS)
def test_config_is_refused(message):
    with pytest.raises(ValueError) as caught:
        replace(config(), **BAD_RUNS[message])
    assert str(caught.value) == message


@pytest.mark.parametrize("field, value", [("lr", 0.0), ("lr", -1.0), ("clip_norm", 0.0)])
def test_optimizer_config_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be above 0.*, got {value}"):
        OptimizerConfig(**{field: value})


def test_steps_of_an_unresolved_run_are_refused():
    with pytest.raises(ValueError, match="batch_size must be resolved before total_steps"):
        _ = replace(config(), batch_size=None).total_steps
