"""The benchmarks' own machinery: parity gates, memory, whole jobs, rows."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
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
    train_step,
)
from bench.cases import CASES, SAMPLE, Case, Start, batch, find_case, real_rows, rows
from bench.clock import Clock, fvu_at, seconds_to
from bench.providers import PROVIDERS, fastsae_step, find_provider
from bench.providers.base import Provider
from bench.report.page import case_title, ops_lines, pipeline_lines
from bench.rivals import OPS, Inputs
from fastsae.data import harvest_all, resolve_hook
from fastsae.data.harvest_run import harvest_to_disk
from harvests import HOOKS, rows_of, small_harvest
from tiny_models import save_stories, save_tiny_llama, tiny_llama

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


def test_a_provider_that_fails_parity_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "broken", Provider(lambda start: lambda x: 1e9))
    found = train_step.times(TINY, ["fastsae", "broken"], repeats=1)
    (row,) = [row for row in found if row["provider"] == "broken"]
    assert row["failed"].startswith("parity: mse 1e+09") and "ms_p50" not in row
    train_step.show(found)
    assert "broken  not timed, parity" in capsys.readouterr().out


def test_what_is_not_installed_or_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def too_large(start):
        raise torch.OutOfMemoryError("of a GPU")

    monkeypatch.setitem(
        PROVIDERS, "absent", Provider(too_large, "no_such_module", "pip install it")
    )
    monkeypatch.setitem(PROVIDERS, "large", Provider(too_large))
    found = train_step.times(TINY, ["fastsae", "absent", "large"], repeats=1)
    said = {row["provider"]: row["failed"] for row in found if "failed" in row}
    assert said == {"absent": "not installed: pip install it", "large": "out of memory"}
    monkeypatch.setitem(PROVIDERS, "fastsae", Provider(too_large))
    (row,) = train_step.times(TINY, ["fastsae", "large"], repeats=1)
    assert (row["provider"], row["failed"]) == ("fastsae", "out of memory")


def test_memory_that_runs_out_while_steps_are_timed_is_a_row_too(monkeypatch, capsys):
    def too_large(*arguments):
        raise MemoryError

    monkeypatch.setattr(train_step, "interleaved", too_large)
    found = train_step.times(TINY, ["fastsae", "plain-pytorch"], repeats=1)
    assert [row["failed"] for row in found] == ["out of memory"] * 2
    whole = importlib.import_module("bench.__main__")
    assert whole.told(found) == found
    assert "plain-pytorch  not timed, out of memory" in capsys.readouterr().out


def test_a_system_that_tells_no_peak_memory_is_timed_all_the_same(monkeypatch):
    def no_such_library(name):
        raise OSError(name)

    monkeypatch.setattr(measure.ctypes, "CDLL", no_such_library)
    (row, *_) = train_step.times(TINY, ["fastsae"], repeats=1)
    assert row["ms_p50"] > 0 and "peak_mib" not in row


def test_a_step_is_held_to_its_floor():
    (row, *others) = train_step.times(TINY, ["fastsae"], repeats=1, skewed=True)
    work = roofline.step_work(TINY, half=False)
    assert work.flop == row["flop"] == 2 * 12 * 16 * 64
    assert work.n_bytes == row["bytes"] == 24 * 2 * 64 * 16 + 4 * 12 * 2 * 16
    assert row["roofline"] == pytest.approx(row["floor_ms"] / row["ms_p50"], abs=2e-3)
    assert row["usage"] == "skewed" and {"gemm_gflops", "copy_gbps", "peak_mib"} <= row.keys()
    assert [r["provider"] for r in others] == ["gemm", "gemm-row-major", "gemm-out"]


def test_steps_are_pooled_over_fresh_processes():
    found = train_step.pooled(2, TINY, ["fastsae", "plain-pytorch"], 1)
    assert [row["provider"] for row in found][:2] == ["fastsae", "plain-pytorch"]
    assert found[0]["over_fastsae"] == 1 and found[1]["ms_p50"] > 0
    assert case_title(found[0]).endswith("; medians over 2 processes")


def test_figures_of_several_processes_are_medians():
    shared = {"provider": "a", "F": 64}
    rows = [{**shared, "ms_p50": ms, "over_gemm": ms / 2} for ms in (1.0, 9.0, 4.0)]
    rows[0] |= {"peak_mib": 7.0, "floor_ms": 2.0, "roofline": 2.0}  # of the first alone
    found = train_step.median_of(rows)
    of_first = {"peak_mib": 7.0, "floor_ms": 2.0, "roofline": 0.5}
    spread = {"ms_p20": 1.0, "ms_p50": 4.0, "ms_p80": 9.0}
    assert found == {**shared, **spread, "over_gemm": 2.0, **of_first}
    assert train_step.median_of([*rows, {"provider": "a", "failed": "why"}])["failed"] == "why"


def test_without_the_first_provider_nothing_is_pooled(tmp_path):
    large = tmp_path / "large.py"
    large.write_text("def step(start):\n    raise MemoryError\n")
    (row,) = train_step.pooled(2, TINY, [f"{large}:step", "fastsae"], 1)
    assert row["failed"] == measure.OUT_OF_MEMORY and row["provider"] == f"{large}:step"


def test_what_fails_parity_in_the_first_process_is_not_timed_in_another(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from pathlib import Path\n"
        "def step(start):\n"
        f"    seen = Path({str(tmp_path / 'seen')!r})\n"
        "    seen.write_text((seen.read_text() if seen.exists() else '') + 'built ')\n"
        "    return lambda x: 1.0\n"
    )
    found = train_step.pooled(2, TINY, ["fastsae", f"{wrong}:step"], 1)
    (failed,) = [row for row in found if "failed" in row]
    assert failed["failed"].startswith("parity: mse 1 and 1")
    assert (tmp_path / "seen").read_text() == "built "
    assert found[0]["processes"] == 2 and found[0]["peak_mib"] >= 0


def test_no_case_is_measured_twice(monkeypatch, capsys):
    def once(case, providers, repeats):
        measured.append((case, providers))
        return [{"provider": name, "ms_p50": 1.0, "B": case.B} for name in providers]

    measured = []
    monkeypatch.setattr(scaling, "times", once)
    both = ["fastsae", "sae-lens"]
    found = scaling.curves({"F": both, "K": both, "B": both[:1]}, 1)
    cases = [case for case, _ in measured]
    assert len(set(cases)) == len(cases) == 4 + 2 + 2
    assert [len(providers) for _, providers in measured] == [2, 2, 1, 1, 2, 2, 1, 1]
    middles = [row for row in found if row["value"] == getattr(scaling.MIDDLE, row["axis"])]
    assert {row["axis"] for row in middles} == {"F", "K", "B"}


def test_skewed_usage_lets_few_latents_fire_on_most_rows():
    case = Case("skew", 256, 64, 512, 8)
    start = Start.random(case, skewed=True)
    h = rows(case) @ start.W_enc + start.b_enc
    counts = h.topk(case.K, dim=1).indices.flatten().bincount(minlength=case.F)
    assert int((counts > 128).sum()) == case.K // 2


def test_a_provider_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bench.providers.plain import plain_step\n"
        "def step(start):\n    return plain_step(start)\n"
    )
    found = train_step.times(TINY, ["fastsae", f"{tmp_path}/mine.py:step"], repeats=1)
    assert not any("failed" in row for row in found)
    for name, said in {
        "fastsea": "did you mean 'fastsae'",
        "nowhere.py:step": "no file 'nowhere.py'",
        f"{tmp_path}/mine.py:other": "got 'other'",
    }.items():
        with pytest.raises(ValueError, match="provider must be") as failure:
            find_provider(name)
        assert said in str(failure.value)
    assert find_case("llama-3.1-8b-1M").F == 1 << 20
    with pytest.raises(ValueError, match="did you mean 'gpt2-small-24k'"):
        find_case("gpt2-small-24")


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


def test_steps_are_timed_on_rows_of_a_harvest(tmp_path, monkeypatch):
    run = small_harvest(
        tmp_path / "rows", str(save_tiny_llama(tmp_path / "model")), save_stories(tmp_path, 600)
    )
    harvest_to_disk(run)
    kept = rows_of(run.out, HOOKS[0])
    case = Case("tiny", 12, kept.shape[1], 64, 2)
    x = batch(case, run.out)
    assert x.shape == (12, case.D) and x.dtype == torch.float32
    assert float(x.norm(dim=1).mean()) == pytest.approx(case.D**0.5, rel=1e-5)
    alike = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(kept.float()).t()
    assert float(alike.max(dim=1).values.min()) > 1 - 1e-5 and not torch.equal(x, rows(case))
    (row, *_) = train_step.times(case, ["fastsae"], repeats=1, shards=run.out)
    assert row["case"] == "tiny-harvested" and row["ms_p50"] > 0
    with pytest.raises(ValueError, match=r"width D = 7 of tiny, got {'blocks.0"):
        batch(replace(case, D=7), run.out)
    with pytest.raises(ValueError, match=rf"B = 1000000 rows of tiny, .* got {len(kept)} in"):
        batch(replace(case, B=1_000_000), run.out)
    arguments = ["train_step", "--case", "gpt2-small-24k", "--shards", str(run.out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"error: shards must hold rows of the width D = 768"):
        train_step.main()


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


@pytest.mark.filterwarnings("ignore")  # the other libraries warn of themselves
def test_the_peers_train_alike_and_are_compared(monkeypatch, capsys):
    pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    monkeypatch.setattr(train_step, "find_case", lambda name: TINY)
    monkeypatch.setattr(sys, "argv", ["train_step", "--peers", "--repeats", "1"])
    train_step.main()
    shown = capsys.readouterr().out
    assert "not timed" not in shown and "peak_mib" in shown
    for peer in train_step.PEERS[1:]:
        assert re.search(rf"[\d.]+ x over {peer}\b", shown), peer
    assert re.search(r"accelerated SAELens: [\d.]+ x$", shown.strip())


@pytest.mark.parametrize("name", ["plain-pytorch", "reference-compiled"])
def test_plain_steps_train_like_the_reference(name):
    found = train_step.times(TINY, ["reference", name], repeats=1)
    assert not any("failed" in row for row in found)


def test_the_compiled_step_is_compiled(monkeypatch):
    def compiled(run, backend, fullgraph):
        asked.append((backend, fullgraph))
        return run

    asked = []
    monkeypatch.setattr(torch, "compile", compiled)
    step = PROVIDERS["reference-compiled"].build(Start.random(TINY))
    assert asked == [("aot_eager", True)] and step(rows(TINY)) > 0


@pytest.mark.parametrize("dead", [0.0, 0.5])
def test_implementations_train_alike(dead):
    start, x = Start.random(TINY, dead), rows(TINY)
    eager, reference = fastsae_step(start), fastsae_step(start, kind="adam", impl="reference")
    for _ in range(4):
        assert eager(x) == pytest.approx(reference(x), rel=1e-4)


def test_a_step_keeps_to_its_workspace():
    """Peak memory of a whole process, at a size where one dense tensor would be 134 MB."""
    if sys.platform != "linux":
        pytest.fail("peak memory is read from /proc, on Linux only")
    code = (
        "import json; from bench.cases import Case; from bench.train_step import memory;"
        "print(json.dumps(memory(Case('memory', 512, 64, 65536, 16))[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=None, capture_output=True, text=True, check=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["dense_latents_mib"] == 128
    assert row["peak_temporary_mib"] <= row["allowed_mib"]


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
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        assert ("sae-lens-flags" in end_to_end.default_methods()) is available
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
