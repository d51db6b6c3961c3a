"""The benchmarks' own machinery: parity gates, memory, rows, and what the tables say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ops, quality, record, train_step
from bench.cases import Case, rows
from bench.providers import Start, fastsae_step

ROOT = Path(__file__).parent.parent
TINY = Case("tiny", 64, 16, 256, 4)


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_has_rivals_that_pass_parity(name, capsys):
    found = ops.times(name, TINY, repeats=1)
    assert "fails parity" not in capsys.readouterr().out
    assert len(found) >= 2 and found[0]["provider"] == "eager"


def test_a_provider_that_fails_parity_is_not_timed(monkeypatch, capsys):
    from bench import providers

    monkeypatch.setitem(providers.PROVIDERS, "broken", lambda start: lambda x: 1e9)
    found = train_step.times(TINY, ["fastsae", "broken"], repeats=1, dead=0.0)
    assert "broken: parity failed" in capsys.readouterr().out
    assert "broken" not in [row["provider"] for row in found]


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
    assert row["bench"] == "x" and row["torch"] == torch.__version__ and row["device"]


def test_time_to_a_figure_is_the_first_point_at_or_under_it():
    curve = [[1.0, 0.5], [2.0, 0.3], [3.0, 0.2]]
    assert quality.seconds_to(curve, 0.3) == 2.0
    assert quality.seconds_to(curve, 0.1) is None
