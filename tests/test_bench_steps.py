"""Training steps, ours and the other libraries', beside each other: parity, pooling, rows."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import measure, ops, roofline, train_step
from bench.cases import Case, Start, batch, find_case, real_rows, rows
from bench.providers import PROVIDERS, fastsae_step, find_provider
from bench.providers.base import Provider
from bench.report.page import case_title
from fastsae.data.harvest_run import harvest_to_disk
from harvests import HOOKS, rows_of, small_harvest
from tiny_models import save_stories, save_tiny_llama

ROOT = Path(__file__).parent.parent
TINY = Case("tiny", 12, 16, 64, 2)


def test_synthetic_rows_have_the_norms_and_outliers_of_real_ones():
    real, made = real_rows(), rows(find_case("gpt2-small-24k"))
    sizes = [x.square().mean(0).sqrt() for x in (real, made)]
    outliers, ours = (s.topk(6).values / s.median() for s in sizes)
    assert ours[:5].tolist() == pytest.approx(outliers[:5].tolist(), rel=0.15)
    assert ours[5] < 3
    norms, ours = (x.norm(dim=1) / x.shape[1] ** 0.5 for x in (real, made))
    assert float(ours.mean()) == pytest.approx(float(norms.mean()), rel=1e-3)
    assert float(ours.std()) == pytest.approx(float(norms.std()), rel=0.2)


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


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch):
    def too_large(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(train_step, "batch", too_large)
    found = train_step.times(TINY, ["fastsae", "plain-pytorch"], repeats=1)
    assert [(row["provider"], row["failed"]) for row in found] == [
        ("fastsae", "out of memory"),
        ("plain-pytorch", "out of memory"),
    ]
    monkeypatch.setattr(ops, "Inputs", too_large)
    (row,) = ops.told(TINY, ["sparse_decode"], 1)
    assert (row["op"], row["failed"]) == ("sparse_decode", "out of memory")


def test_a_process_that_the_system_ends_is_a_row_too(tmp_path):
    ended = tmp_path / "ended.py"
    ended.write_text("import os\ndef step(start):\n    os.kill(os.getpid(), 9)\n")
    (row,) = train_step.pooled(2, TINY, [f"{ended}:step"], 1)
    assert row["failed"] == "out of memory"


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
