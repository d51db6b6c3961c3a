"""`python -m bench.gpu_check` without a GPU: in miniature, and what it says of failures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, measure
from bench.gpu import harness, speed, truth
from fastsae_kernels import SparseCode

ROOT = Path(__file__).parent.parent


def functions():
    for name, part in gpu_check.PARTS.items():
        for function in part.run:
            yield pytest.param(name, function, id=f"{name}-{function.__name__}")


@pytest.mark.skipif(not harness.DRY, reason="a GPU runs `python -m bench.gpu_check` itself")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, function", list(functions()))
def test_the_gpu_run_in_miniature(name, function, tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    out = tmp_path / "rows.jsonl"
    made = harness.Report(name, 60.0, out)
    rows, kept = [], made.measured
    monkeypatch.setattr(made, "measured", lambda row, text: (rows.append(row), kept(row, text)))
    function(harness.QUICK, made)
    shown = capsys.readouterr().out
    for row in rows:
        if row["bench"] in ("gpu_step", "gpu_encode"):
            assert "failed" not in row and row["flop"] > 0 and "roofline" in row
            assert row["ms"] == row["ms_p20"] == row["ms_p50"] == row["ms_p80"] == 1000.0
    assert made.failures == [], shown
    assert " fails " not in shown and "left out:" not in shown
    # Without a GPU nothing is timed and nothing is kept.
    assert not re.search(r"\d ms", shown) and not out.exists()


def test_the_truth_in_pieces_is_the_truth(monkeypatch):
    x, weight, bias = torch.randn(9, 8), torch.randn(50, 8).bfloat16(), torch.randn(50)
    scores = (x.double() @ weight.double().t() + bias.double()).relu()
    for piece in (1 << 20, 90):
        monkeypatch.setattr(truth, "PIECE", piece)
        values, indices = truth.largest(x, weight, bias, 5)
        assert torch.allclose(values, scores.topk(5, dim=1).values)
        assert torch.allclose(scores.gather(1, indices), values)
        assert torch.allclose(truth.scores_at(x, weight, bias, indices), values)
        code = SparseCode(values, indices.int())
        exact = code.to_dense(50) @ weight.double()
        assert torch.allclose(truth.decoded(code, weight), exact)


def test_device_times_are_between_events(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def elapsed_time(self, stop):
            return stop.at - self.at

    def work():
        Event.now += 2.0  # milliseconds

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: empty(8, dtype=dtype))
    found = measure.interleaved({"work": work, "none": lambda: None}, 3, device="cuda")
    assert found == {"work": [0.002] * 3, "none": [0.0] * 3}
    assert measure.in_a_row(work, 5) == pytest.approx([0.002] * 5)


def test_a_part_that_fails_is_reported_and_the_next_function_runs(monkeypatch, capsys):
    def breaks(scale, report):
        raise RuntimeError("out of luck")

    def works(scale, report):
        report.check("works", True, figure=1.0)

    monkeypatch.setitem(gpu_check.PARTS, "made", gpu_check.Part(60.0, (breaks, works)))
    failures = gpu_check.run_part("made", harness.QUICK, None)
    shown = capsys.readouterr().out
    assert failures == ["breaks runs to its end"]
    assert "out of luck" in shown and "ok   works: figure 1" in shown


def test_a_process_that_fails_or_hangs_is_named(tmp_path, capsys):
    run = [sys.executable, "-c"]
    start = gpu_check.Child.start
    fine = start("fine", [*run, "print('all well')"], 60.0, tmp_path)
    failing = start("failing", [*run, "raise SystemExit(3)"], 60.0, tmp_path)
    hanging = start("hanging", [*run, "import time; time.sleep(60)"], 0.5, tmp_path)
    assert [c.wait() for c in (fine, failing, hanging)] == [None, "exit status 3", "out of time"]
    assert "all well" in capsys.readouterr().out


def test_each_file_of_tests_leaves_a_row(tmp_path, monkeypatch, capsys):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_a(): pass\ndef test_b(): pass\n")
    bad.write_text("import pytest\ndef test_a(): assert 0\ndef test_b(): pytest.skip('c')\n")
    monkeypatch.setattr(gpu_check, "kernel_tests", lambda: ([good, bad], []))
    monkeypatch.setattr(harness, "DRY", False)
    out = tmp_path / "rows.jsonl"
    assert gpu_check.run_all(["tests"], True, out) == ["test_bad: exit status 1"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ("check", "passed", "tests_passed", "tests_failed", "tests_skipped")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("tests of test_good", True, 2, 0, 0),
        ("tests of test_bad", False, 0, 1, 1),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert "FAIL tests of test_bad" in capsys.readouterr().out


def test_a_file_of_tests_that_is_ended_counts_nothing(tmp_path):
    assert gpu_check.tests_counted(tmp_path / "none.xml") == {}


def test_the_gpu_run_takes_the_tests_of_every_kernel():
    chosen, left_out = gpu_check.kernel_tests()
    names = {path.name for path in chosen}
    assert {path.name for path in (ROOT / "tests").glob("test_*_kernel.py")} <= names
    assert "test_topk_encode.py" in names and "test_aot.py" not in names
    assert left_out == []


COLLECTS_WITHOUT_EXTRAS = """
import sys

absent = "jaxtyping beartype datasets gguf matplotlib mwparserfromhell sae_lens sparsify tqdm"
absent += " transformer_lens transformers tyro wandb xdist pytest_benchmark hypothesis"
sys.modules.update(dict.fromkeys(absent.split()))

import pytest
from bench import gpu_check

chosen, left_out = gpu_check.kernel_tests()
print(*left_out, sep="\\n")
sys.exit(pytest.main([*gpu_check.PYTEST_OPTIONS, "--collect-only", *map(str, chosen)]))
"""


def test_a_machine_without_the_extras_collects_the_tests_of_every_kernel():
    # The plugin of an absent package cannot be loaded.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", COLLECTS_WITHOUT_EXTRAS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_saes.py left out: jaxtyping absent" in run.stdout
    for path in (ROOT / "tests").glob("test_*_kernel.py"):
        assert path.name in run.stdout


def test_the_summary_names_failed_checks_and_figures():
    rows = [
        {"bench": "gpu_check", "check": "one", "passed": True},
        {"bench": "gpu_check", "check": "two", "passed": False},
        {"bench": "gpu_encode", "case": "c", "provider": "ours", "ms": 2.0, "over_cublas": 1.1},
        {"bench": "gpu_step", "case": "c", "provider": "fastsae", "ms": 3.0, "over_floor": 1.2},
    ]
    text = gpu_check.summary(rows)
    assert "1 of 2 checks passed" in text and "FAILED two" in text
    assert "1.10 x cuBLAS" in text and "1.20 x floor" in text


def test_the_gpu_run_fits_its_eight_minutes():
    longest = {name: part.budget + gpu_check.GRACE for name, part in gpu_check.PARTS.items()}
    timed = sum(longest[name] for name, part in gpu_check.PARTS.items() if part.timed)
    untimed = [longest[name] for name, part in gpu_check.PARTS.items() if not part.timed]
    assert max(*untimed, gpu_check.TESTS_BUDGET) + timed < 8 * 60


def test_libraries_are_timed_or_named_with_their_command(monkeypatch, capsys):
    pytest.importorskip("jaxtyping")
    from bench import providers

    absent = providers.Provider(providers.plain_step, "no_such_module", "pip install it")
    monkeypatch.setitem(providers.PROVIDERS, "absent", absent)
    made, rows = harness.Report("steps", 60.0), []
    made.measured = lambda row, text: rows.append(row)
    monkeypatch.setattr(providers, "GPU_PEERS", ["fastsae", "plain-pytorch", "absent"])
    made.budget = 1.0
    speed.peers(harness.QUICK, made)
    assert "left out for want of time: other libraries" in capsys.readouterr().out and rows == []
    made.budget = 60.0
    speed.peers(harness.QUICK, made)
    timed = [row["provider"] for row in rows if "over_fastsae" in row]
    assert [r["failed"] for r in rows if "failed" in r] == ["not installed: pip install it"]
    assert timed[:2] == ["fastsae", "plain-pytorch"] and rows[0]["bench"] == "train_step"


def test_a_rival_that_trains_otherwise_or_does_not_fit_is_a_row(monkeypatch):
    made, rows = harness.Report("steps", 60.0), []
    made.measured = lambda row, text: rows.append(row)
    monkeypatch.setattr(speed, "FusedStep", lambda case, impl: lambda x: torch.ones(()))
    monkeypatch.setattr(speed, "trainer_step", lambda case: lambda x: torch.ones(()))
    monkeypatch.setattr(speed, "bag_step", lambda case: lambda x: torch.tensor(1.5))
    monkeypatch.setattr(speed, "dense_step", lambda case, compiled=False: lambda x: torch.ones(()))
    speed.steps(harness.QUICK, made)
    failed = {row["provider"]: row["failed"] for row in rows if "failed" in row}
    assert list(failed) == ["plain PyTorch, embedding_bag"] and made.failures == []
    assert "parity: mse 1.5" in failed["plain PyTorch, embedding_bag"]
    rows.clear()
    monkeypatch.setattr(speed, "gibibytes", lambda: 1.0)
    speed.steps(harness.QUICK, made)
    assert [row["failed"] for row in rows] == ["out of memory: needs 8 GiB"]


def test_an_encode_of_other_activations_is_named():
    values = torch.tensor([[2.0, 1.0], [3.0, 0.0]])
    code = lambda values: lambda: SparseCode(values, torch.zeros(2, 2, dtype=torch.int32))
    runs: dict[str, Any] = {
        "ours": code(values),
        "turned": code(values.flip(1)),
        "other": code(2 * values),
    }
    found = speed._unlike(runs, "ours", ("turned", "other", "absent"))
    assert found == {"other": "parity: relative error 1.0e+00"}


def test_launches_of_a_run_without_a_gpu_are_none():
    assert measure.launches(lambda: torch.ones(2) + 1, calls=1) == {}


def test_the_miniature_is_large_enough_for_the_kernels():
    """Smaller dictionaries are left to `eager`, and the check would check nothing."""
    kernel = pytest.importorskip("fastsae_kernels.topk.kernel")
    from bench.gpu import harness

    for case in (harness.QUICK.encode[0], harness.QUICK.training):
        assert kernel.fits(case.F, case.K)
