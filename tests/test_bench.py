"""The benchmarks' own machinery: parity gates, memory, whole jobs, rows."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import (
    end_to_end,
    measure,
    ops,
    pipeline,
    record,
    roofline,
    scaling,
)
from bench.cases import CASES, SAMPLE, Case, real_rows
from bench.clock import Clock, fvu_at, seconds_to
from bench.providers import PROVIDERS, fastsae_step
from bench.providers.base import Provider
from bench.report.page import ops_lines, pipeline_lines
from bench.rivals import OPS, Inputs
from fastsae.data import harvest_all, resolve_hook
from tiny_models import tiny_llama

ROOT = Path(__file__).parent.parent
TINY = Case("tiny", 12, 16, 64, 2)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_rivals_that_pass_parity(name):
    limits = {"gemm_gflops": 100.0, "copy_gbps": 10.0}
    found = ops.times(name, Inputs(TINY, "cpu"), 1, limits)
    assert not any("failed" in row for row in found)
    assert len(found) >= 2 and found[0]["provider"] == "eager"
    assert "triton" not in [row["provider"] for row in found]  # interpreted: checked, not timed
    assert roofline.op_work(name, TINY, 4) is None or "roofline" in found[0]
    assert name in ops.line_of(found[0])


def test_scores_rounded_to_bf16_stay_on_their_side_of_the_threshold():
    t = Inputs(TINY, "cpu")
    limit = t.threshold()
    scores = t.x @ t.W_enc.detach()
    assert limit.shape == (TINY.F,) and len(limit.unique()) == 1
    assert torch.equal(scores.bfloat16() > limit, scores > limit)
    n_above, n_kept = int((scores > limit).sum()), TINY.K * TINY.B
    assert n_kept // 2 < n_above <= n_kept + 2


def test_a_floor_counts_the_latents_that_a_code_touches():
    t = Inputs(TINY, "cpu")
    assert t.touched == len(t.code().indices.unique()) < TINY.B * TINY.K
    (ours, _) = ops.times("lazy_row_adam from pairs", t, 1, {"gemm_gflops": 1.0, "copy_gbps": 1.0})
    moved = 6 * 4 * TINY.D * t.touched + 4 * TINY.B * TINY.D
    assert (ours["flop"], ours["bytes"]) == (0, moved)
    at_most = roofline.op_work("lazy_row_adam from pairs", TINY, 4)
    assert at_most is not None and at_most.n_bytes == moved + 24 * TINY.D * (24 - t.touched)


def test_an_op_that_differs_is_not_timed(monkeypatch):
    original = OPS["sparse_decode"]

    def with_liars(t):
        def broken():
            raise RuntimeError("no such thing")

        return original(t) | {"doubled": lambda: 2 * original(t)["eager"](), "broken": broken}

    monkeypatch.setitem(OPS, "sparse_decode", with_liars)
    found = ops.times("sparse_decode", Inputs(TINY, "cpu"), 1)
    said = {row["provider"]: row["failed"] for row in found if "ms_p50" not in row}
    assert said["doubled"].startswith("parity: relative error")
    assert said["broken"].startswith("RuntimeError: ") and len(said) == 2
    shown = [ops.line_of(row) for row in found if "failed" in row]
    assert "not timed, parity" in shown[0]
    limits = {"gemm_gflops": 1.0, "copy_gbps": 1.0, "device": "d", "threads": 1, "date": "2026"}
    text = "\n".join(ops_lines([row | limits for row in found], lambda name: []))
    assert "Not timed: doubled (sparse_decode), parity" in text


def test_the_ceilings_are_positive():
    assert all(value > 0 for value in roofline.ceilings(Case("small", 64, 64, 1024, 4)).values())


def test_no_case_is_measured_twice(monkeypatch, capsys):
    def once(case, providers, repeats, device):
        measured.append((case, providers))
        return [{"provider": name, "ms_p50": 1.0, "on": device} for name in providers]

    measured = []
    monkeypatch.setattr(scaling, "times", once)
    both = ["fastsae", "sae-lens"]
    found = scaling.curves({"F": both, "K": both, "B": both[:1]}, 1)
    cases = [case for case, _ in measured]
    assert len(set(cases)) == len(cases) == 4 + 2 + 2
    assert [len(providers) for _, providers in measured] == [2, 2, 1, 1, 2, 2, 1, 1]
    middles = [row for row in found if row["value"] == getattr(scaling.MIDDLE, row["axis"])]
    assert {row["axis"] for row in middles} == {"F", "K", "B"}
    assert all(row["on"] == "cpu" and row["value"] <= 262_144 for row in found)
    on_gpu = scaling.curves({"F": both[:1]}, 1, "cuda")
    assert [row["value"] for row in on_gpu][-2:] == [262_144, 1_048_576]
    assert {row["on"] for row in on_gpu} == {"cuda"}


def test_the_fitted_model_is_found_again():
    known = [0.3, 0.0, 2.0, 5.0]
    made: list[dict[str, float]] = [
        {"B": b, "D": d, "F": f, "K": k}
        for b, d, f, k in ((256, 64, 4096, 8), (512, 64, 8192, 8), (256, 128, 65_536, 32),
                           (1024, 256, 4096, 64), (64, 512, 16_384, 128))
    ]  # fmt: skip
    for row in made:
        row["ms_p50"] = scaling.predicted(row, known)
    assert scaling.fit(made) == pytest.approx(known, abs=1e-6)


def test_the_command_is_quick_and_keeps_its_rows(tmp_path, monkeypatch, capsys):
    from fastsae import cli

    whole = importlib.import_module("bench.__main__")
    monkeypatch.setattr(whole, "STEP_PROVIDERS", ["fastsae", "plain-pytorch"])
    monkeypatch.setattr(whole, "find_case", lambda name: TINY)
    cli.main(["bench", "--quick", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "plain-pytorch" in shown and "fastsae: " in shown
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in kept][:2] == ["fastsae", "plain-pytorch"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "bench must be run from the root of a clone" in capsys.readouterr().err


def test_the_command_takes_a_case_and_providers(tmp_path, monkeypatch, capsys):
    from fastsae import cli

    (tmp_path / "mine.py").write_text("from bench.providers.plain import plain_step as step\n")
    monkeypatch.setitem(CASES, "tiny", TINY)
    mine = f"{tmp_path}/mine.py:step"
    run = ["bench", "--out", str(tmp_path), "--case", "tiny", "--providers", "plain-pytorch", mine]
    cli.main([*run, "--quick"])
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["case"], row["provider"]) for row in kept][:2] == [
        ("tiny", "plain-pytorch"),
        ("tiny", mine),
    ]
    assert "\nplain-pytorch: " in capsys.readouterr().out  # what the others are compared with
    for wrong, said in {
        "--case=tinny": "did you mean 'tiny'",
        "--providers=fastsea": "did you mean 'fastsae'",
        "--shards=nowhere": "activations must be a folder",
        "--parts=ops": "must be given with step",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main([*run, wrong])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_step_part_times_what_was_asked_for(tmp_path, monkeypatch):
    whole = importlib.import_module("bench.__main__")
    asked = []

    def pooled(draws, *arguments, **options):
        asked.append((arguments, options))
        return [{"provider": "fastsae", "failed": "no time", "case": "c", "dead": 0, "usage": "u"}]

    monkeypatch.setattr(whole, "pooled", pooled)
    monkeypatch.setattr(whole.report, "write", lambda *arguments: None)
    whole.main(["--parts", "step", "--providers", "reference", "--out", str(tmp_path)])
    ((arguments, options),) = asked
    assert arguments[:2] == (CASES["smollm2-135m-16k"], ["reference"])
    assert options == {"shards": None}


def test_the_cases_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    rows_file = tmp_path / "rows.json"
    run = [sys.executable, "-m", "pytest", "bench/test_speed.py", "--benchmark-only", "-q"]
    run += ["-k", "pair_dots", "--benchmark-json", str(rows_file), "-p", "no:cacheprovider"]
    # A worker of pytest-xdist does not time anything, and kernels are interpreted in tests alone.
    inside = ("PYTEST_", "TRITON_INTERPRET")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(inside)}
    done = subprocess.run(run, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(rows_file.read_text())["benchmarks"]
    shared = {"case": "smollm2-135m-4k", "op": "pair_dots"}
    assert [one["extra_info"] for one in found] == [
        shared | {"provider": name} for name in ("eager", "torch.compile")
    ]
    assert {one["stats"]["rounds"] for one in found} == {5}


def test_what_fails_parity_is_not_timed_under_pytest_benchmark(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    speed = importlib.import_module("bench.test_speed")
    timed = []
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda *a, **options: timed.append(options))
    original = OPS["sparse_decode"]
    doubled = lambda t: original(t) | {"doubled": lambda: 2 * original(t)["eager"]()}
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setitem(OPS, "sparse_decode", doubled)
    monkeypatch.setitem(PROVIDERS, "broken", Provider(lambda start: lambda x: 1e9))
    for name in ("eager", "reference"):
        speed.test_op(benchmark, "tiny", "sparse_decode", name)
    speed.test_step(benchmark, "tiny", "plain-pytorch")
    assert len(timed) == 3
    with pytest.raises(AssertionError, match="parity: relative error"):
        speed.test_op(benchmark, "tiny", "sparse_decode", "doubled")
    with pytest.raises(AssertionError, match=r"parity: mse 1e\+09"):
        speed.test_step(benchmark, "tiny", "broken")
    assert len(timed) == 3
    assert {op for op, _ in speed.OP_RUNS} == {*OPS}


def test_rows_carry_the_hardware_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.append("made", [{"bench": "x"}])
    row = json.loads((tmp_path / "made.jsonl").read_text())
    assert row["bench"] == "x" and torch.__version__.startswith(row["torch"]) and row["device"]
    monkeypatch.setattr(record, "_git", lambda *arguments: "")
    monkeypatch.setenv("COMMIT", "abc1234")
    record.append(tmp_path / "elsewhere" / "rows.jsonl", [{"bench": "y"}])
    row = json.loads((tmp_path / "elsewhere" / "rows.jsonl").read_text())
    assert row["commit"] == "abc1234"


def test_rows_of_a_gpu_name_the_one_that_is_visible(monkeypatch):
    asked = []

    def old_driver(query, **options):
        asked.append(query)
        if "clocks_event_reasons" in query[1]:
            raise subprocess.CalledProcessError(2, query)
        return subprocess.CompletedProcess(query, 0, "1.2, 900 MHz, 1980 MHz, 2619 MHz, 0x4\n")

    gpu = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(record, "_commit", lambda: {})
    monkeypatch.setattr(subprocess, "run", old_driver)
    row = record.environment()
    assert (row["device"], row["sm_clock"], row["throttle_reasons"]) == ("H200", "900 MHz", "0x4")
    assert len(asked) == 2 and asked[1][-2:] == ["-i", "GPU-abc"]
    del gpu.uuid
    assert record._gpu_id() == "3"
    on_cpu = record.environment("cpu")
    assert on_cpu["device"] != "H200" and on_cpu["cuda"] is None and "driver" not in on_cpu


def test_a_curve_tells_when_and_by_when():
    curve = [(1.0, 0.5), (2.0, 0.3), (3.0, 0.2)]
    assert seconds_to(curve, 0.3) == 2.0
    assert seconds_to(curve, 0.1) is None
    assert (fvu_at(curve, 2.9), fvu_at(curve, 0.9)) == (0.3, None)


def test_short_runs_take_more_turns_and_ratios_are_of_the_same_turn():
    for least, turns in ((0.0, {2}), (0.1, {3, 4, 5}), (60.0, {10})):
        runs = {"a": lambda: time.sleep(0.02)}
        seconds = measure.interleaved(runs, 2, warm_up=0, least_seconds=least)
        assert len(seconds["a"]) in turns
    assert measure.times_as_long([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_a_clock_that_stands_counts_nothing():
    clock = Clock()
    clock.start()
    with clock.stopped():
        shown = clock.seconds
        time.sleep(0.05)
        assert clock.seconds == shown
    clock.stop()
    assert shown <= clock.seconds < shown + 0.05


def test_whole_jobs_of_several_layers_are_measured(monkeypatch, capsys):
    """Ours, one that ends with ours, and one that fails."""
    lm = tiny_llama(num_hidden_layers=3)
    hooks = [resolve_hook(lm, f"blocks.{layer}.hook_resid_post") for layer in (0, 1)]
    drawn = lambda n: torch.randint(50, (n, 64), generator=torch.Generator().manual_seed(n))
    held_out = harvest_all(lm, hooks, drawn(12))
    job = end_to_end.Job(lm, [0, 1], hooks, drawn(64), held_out, d_sae=64, k=4)
    ours = end_to_end.METHODS["fastsae"]

    def broken(job, clock):
        raise RuntimeError("no active drivers\nand more")

    monkeypatch.setattr(end_to_end, "BATCH", 256)
    monkeypatch.setitem(end_to_end.METHODS, "again", lambda job, _: ours(job, Clock()))
    monkeypatch.setitem(end_to_end.METHODS, "broken", broken)
    rows = end_to_end.measure(job, ["fastsae", "again", "broken"], turns=2)
    order = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert order == ["fastsae", "again", "again", "fastsae"]
    assert [row["case"] for row in rows] == ["smollm2-135m layers 0, 1"] * 3
    assert rows[0]["over_fastsae"] == 1.0 and rows[0]["fraction"] > 0
    assert rows[1]["fvu"] == rows[0]["fvu"] < 1  # the mean of two SAEs that learned
    assert 0 < rows[1]["to_its_fvu"] <= rows[0]["seconds"]
    assert rows[2]["failed"] == "RuntimeError: no active drivers"
    absent = Provider(fastsae_step, "no_such_module", "pip install it")
    monkeypatch.setitem(PROVIDERS, "sparsify", absent)
    (row,) = end_to_end.measure(job, ["sparsify"])
    assert row["failed"] == "not installed: pip install it"
    assert "over_fastsae" not in rows[2]


def test_the_flags_of_sae_lens_reach_its_runner_and_are_for_a_gpu(monkeypatch):
    asked = []
    one = lambda job, layer, clock, flags: asked.append((layer, flags))
    monkeypatch.setattr(end_to_end, "_sae_lens_at", one)
    job: Any = SimpleNamespace(layers=[3])
    for name in ("sae-lens", "sae-lens-flags"):
        end_to_end.METHODS[name](job, Clock())
    assert asked == [(3, {}), (3, end_to_end.SAE_LENS_FLAGS)]
    assert "sae-lens-flags" not in end_to_end.default_methods("cpu")
    assert "sae-lens-flags" in end_to_end.default_methods("cuda")
    absent = Provider(fastsae_step, "no_such_module", "pip install it")
    monkeypatch.setitem(PROVIDERS, "sae-lens", absent)
    ran = end_to_end.run(job, ["sae-lens-flags"], turns=1)
    assert ran["sae-lens-flags"].failed == "not installed: pip install it"


def test_the_sample_of_real_rows_is_small_and_heavy_tailed():
    x = real_rows()
    assert SAMPLE.stat().st_size < 20 << 20
    assert x.shape == (8192, 576) and bool(torch.isfinite(x).all())
    assert float(x.norm(dim=1).mean()) == pytest.approx(24.0, rel=1e-4)
    assert float(x.abs().max() / x.std()) > 30


def test_the_comparison_does_not_turn_the_interpreter_on():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import os, bench.__main__; assert 'TRITON_INTERPRET' not in os.environ"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_the_way_of_the_data_is_measured_at_every_level(monkeypatch, capsys):
    for name, small in (("BATCH", 256), ("STEPS", 2), ("READ_BYTES", 3 << 20)):
        monkeypatch.setattr(pipeline, name, small)
    arguments = ["--tokens", "1024", "--layer", "0", "--d-sae", "64", "--repeats", "1"]
    found = pipeline.main(arguments)
    assert {(row["level"], row["provider"]) for row in found} == {
        *(("harvest", name) for name in ("fastsae", "bare forward pass")),
        *(("read-back", name) for name in ("fastsae", "safetensors", "numpy.memmap")),
        *(("step", name) for name in ("fastsae", "rows in memory")),
    }
    assert all(row["rate"] > 0 for row in found)
    lines = pipeline_lines([row | record.environment() for row in found])
    assert sum(line.startswith("| read-back") for line in lines) == 3
