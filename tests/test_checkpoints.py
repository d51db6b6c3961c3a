"""What survives a kill: a run continues to the same bits, or says why it cannot."""

import json
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastsae import Trainer
from fastsae.interop.formats import load_sae
from fastsae.training.log import RunLog, read_log
from training_runs import (
    KINDS,
    ROWS,
    B,
    D,
    K,
    assert_same_bits,
    config,
    standard_config,
    state,
    timeless,
    topk_config,
    train,
)


def in_full(values):
    """Parameters of the longer form of a test."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class TestResume:
    @pytest.mark.parametrize("stop", [37, *in_full(range(11, 60, 3))])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "sae, compute",
        [(topk_config(), None), (standard_config(), None), (topk_config(), "bfloat16")],
        ids=["topk", "standard", "topk with bfloat16 products"],
    )
    def test_a_resumed_run_ends_like_one_never_stopped(self, kind, sae, compute, stop, tmp_path):
        cfg = config(kind=kind, sae=sae, data={"compute_dtype": compute}, checkpoint={"every": 10})
        whole = Trainer(cfg, device="cpu", out=tmp_path / "whole")
        train(whole)
        train(Trainer(cfg, device="cpu", out=tmp_path / "parts"), stop_before=stop)
        resumed = Trainer(cfg, device="cpu", out=tmp_path / "parts")
        assert resumed.resume() and resumed.steps_done == stop // 10 * 10
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
    @pytest.mark.parametrize("seed", [0, *in_full(range(1, 9))])
    def test_a_run_killed_at_any_moment_ends_like_one_never_killed(self, seed, tmp_path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "fastsae", "pytest"])
        moment = random.Random(seed)
        train_in_this_process(tmp_path / "whole")
        for exitcode in [-9] * 5 + [0]:
            kill = (moment.randrange(1, 18), moment.uniform(0.0, 0.01)) if exitcode else None
            process = context.Process(
                target=train_in_this_process, args=(tmp_path / "killed", kill)
            )
            process.start()
            process.join()
            assert process.exitcode == exitcode
        found, expected = (saved_run(tmp_path / name) for name in ("killed", "whole"))
        assert_same_bits(found[0], expected[0])
        assert found[1] == expected[1]


KILLED_STEPS = 120


def train_in_this_process(out, kill=None):
    """Train to the end; or with kill=(n, s) only to s seconds after n further steps."""
    torch.set_num_threads(1)
    cfg = config(steps=KILLED_STEPS, checkpoint={"every": 3})
    trainer = Trainer(cfg, device="cpu", out=out)
    trainer.resume()
    first = trainer.steps_done

    def batches():
        for step, x in enumerate(ROWS.from_step(first)):
            if kill is not None and step == kill[0]:
                threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            yield x

    trainer.fit(batches(), sample=ROWS.rows)


def saved_run(out):
    path = out / "checkpoints" / f"step-{KILLED_STEPS:09d}"
    files = ("sae_weights.safetensors", "trainer_state.safetensors")
    tensors = {k: v for name in files for k, v in load_file(path / name).items()}
    return tensors, timeless(out / "metrics.jsonl")


class TestCheckpoints:
    @pytest.mark.parametrize("scaling", ["expected_average_only_in", "covariance_whitening"])
    def test_one_is_an_sae_as_the_run_exports_it(self, scaling, tmp_path):
        sae = topk_config(normalize_activations=scaling)
        trainer = Trainer(config(sae=sae), device="cpu", out=tmp_path)
        exported = train(trainer)
        found = load_sae(tmp_path / "checkpoints" / "step-000000060")
        assert exported is not None and found.cfg.normalize_activations == "none"
        wanted = exported.state_dict()
        assert all(torch.equal(t, wanted[name]) for name, t in found.state_dict().items())

    def test_one_of_several_processes_is_no_sae(self, tmp_path):
        trainer = Trainer(config(), device="cpu", out=tmp_path)
        train(trainer)
        path = tmp_path / "checkpoints" / "step-000000060"
        (path / "trainer_state.safetensors").unlink()
        with pytest.raises(ValueError, match="which several processes wrote; resume the run"):
            load_sae(path)

    def test_the_newest_are_kept(self, tmp_path):
        train(Trainer(config(checkpoint={"every": 25, "keep": 2}), device="cpu", out=tmp_path))
        names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert names == ["step-000000050", "step-000000060"]

    def test_one_is_written_at_the_end_of_every_run(self, tmp_path):
        train(Trainer(config(), device="cpu", out=tmp_path))
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000060"]

    def test_nothing_is_written_without_out(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer = Trainer(config(checkpoint={"every": 1}), device="cpu")
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
            ({"steps": 61}, f"data.total_tokens: {60 * B} then, {61 * B} now"),
            ({"kind": "adam"}, "optimizer.kind: 'row_adam' then, 'adam' now"),
            ({"sae": topk_config(k=5)}, f"sae.k: {K} then, 5 now"),
            ({"sae": standard_config()}, "architecture: 'topk' then, 'standard' now; "),
            ({"data": {"batch_size": 2 * B}}, f"data.batch_size: {B} then, {2 * B} now"),
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
        train(Trainer(config(checkpoint={"every": 10}), device="cpu", out=tmp_path), stop_before=30)
        cfg = config(log={"every": 1}, checkpoint={"every": 5, "keep": 9})
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

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_told_with_the_file(self):
        with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
            RunLog(Path("/dev/full")).write({"step": 1})
