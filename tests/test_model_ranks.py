"""A streamed model in processes of its own: the rows, and so the weights, are those without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsae.training.language_model_run import train_on_language_model
from fastsae.training.run_config import LanguageModelRun
from tiny_models import save_stories, save_tiny_llama

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model-ranks")
    return LanguageModelRun(
        out=folder / "alone",
        model=str(save_tiny_llama(folder / "model")),
        dataset=save_stories(folder, 120),
        context_size=32,
        stream=True,
        buffer_rows=1000,
        hook="blocks.0.hook_resid_post",
        tokens=64 * 40,
        batch_size=64,
        eval_tokens=256,
        sae={"d_sae": 64, "k": 4},
        device="cpu",
    )


def command(run: LanguageModelRun, n: int, *more: str) -> list[str]:
    options = {
        "--out": run.out,
        "--model": run.model,
        "--dataset": run.dataset,
        "--context-size": 32,
        "--buffer-rows": 1000,
        "--hook": run.hook,
        "--tokens": run.tokens,
        "--batch-size": 64,
        "--eval-tokens": 256,
        "--d-sae": 64,
        "--k": 4,
        "--device": "cpu",
        "--timeout-seconds": 60,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    named = [str(part) for option in options.items() for part in option]
    return [*launch, "-m", "fastsae", "train", "--stream", *named, *more]


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)


def trained(run: LanguageModelRun, n: int, *more: str) -> bytes:
    """Weights that so many processes end with."""
    done = ended(command(run, n, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run.out / "run.png").is_file()
    return (run.out / "sae" / "sae_weights.safetensors").read_bytes()


def test_one_trains_and_one_runs_the_model(run, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_on_language_model(run)
    torch.set_num_threads(threads)
    beside = replace(run, out=tmp_path / "beside")
    weights = trained(beside, 2, "--model-ranks", "1")
    assert weights == (run.out / "sae" / "sae_weights.safetensors").read_bytes()
    reports = [json.loads((one.out / "eval.json").read_text()) for one in (run, beside)]
    for report in reports:
        for figure in ("seconds", "tokens_per_second"):
            report["training"].pop(figure)
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "beside"), [((2, 1), 1), ((1, 2), 2)])
def test_several_are_served(run, tmp_path, mesh, beside):
    dp_tp = ["--dp", str(mesh[0]), "--tp", str(mesh[1])]
    without = trained(replace(run, out=tmp_path / "without"), 2, *dp_tp)
    more = [*dp_tp, "--model-ranks", str(beside)]
    assert trained(replace(run, out=tmp_path / "beside"), 2 + beside, *more) == without


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_goes_on_where_either_is_killed(run, tmp_path, killed):
    longer = replace(run, tokens=64 * 1000)
    more = ["--model-ranks", "1", "--checkpoints", "100"]
    whole = trained(replace(longer, out=tmp_path / "whole"), 2, *more)
    cut = replace(longer, out=tmp_path / "cut")
    began = subprocess.Popen(
        command(cut, 2, *more), env=ONE_THREAD, stderr=subprocess.PIPE, text=True
    )
    saved = cut.out / "checkpoints"
    while not (saved.is_dir() and any(saved.glob("step-*"))):
        assert began.poll() is None
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(began.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[killed]), signal.SIGKILL)
    said = began.communicate()[1]
    assert began.returncode != 0
    assert f"dead: rank {killed} (pid" in said
    assert trained(cut, 2, *more, "--resume") == whole


@pytest.mark.slow
def test_only_batches_have_to_come_within_the_time_out(run, tmp_path):
    one = replace(run, out=tmp_path / "slow")
    whole = command(one, 3, "--dp", "2", "--model-ranks", "1", "--timeout-seconds", "6")
    at = whole.index("-m", 2)  # the module that torchrun starts
    slowed = [*whole[:at], str(Path(__file__).with_name("slow_model.py")), *whole[at + 2 :]]
    done = ended(slowed)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_what_is_wrong_with_the_model_is_said_by_all(run, tmp_path):
    wrong = replace(run, out=tmp_path / "wrong", hook="blocks.7.hook_resid_post")
    done = ended(command(wrong, 2, "--model-ranks", "1"))
    assert done.returncode != 0
    assert done.stderr.count("hook layer must be from 0 to 1 in") == 2, done.stderr[-3000:]


def test_bad_numbers_of_processes_are_refused(run):
    with pytest.raises(ValueError, match="model_ranks must be 0 without stream, got 1"):
        replace(run, stream=False, model_ranks=1)
    with pytest.raises(ValueError, match="model_ranks must be at least 0"):
        replace(run, model_ranks=-1)
    with pytest.raises(ValueError, match=r"at most dp \* tp, got 2 for 1 \* 1"):
        replace(run, model_ranks=2).mesh_shape(3, 3)
    with pytest.raises(ValueError, match="0 with distribute 'layers', got 1"):
        replace(run, model_ranks=1, distribute="layers")
    with pytest.raises(ValueError, match=r"got 1 \* 1 \+ 1 and 1 processes"):
        train_on_language_model(replace(run, model_ranks=1))
