"""What the tables and pictures of the benchmarks say."""

import json
import re

from bench import report
from bench.report import plots
from bench.report.gpu import gpu_lines
from bench.report.ops import op_figures
from bench.report.rows import committed, with_floor


def made_rows():
    here = {"device": "a CPU", "threads": 2, "torch": "2", "date": "2026-01-01T00:00:00Z"}
    limits = {"gemm_gflops": 100.0, "copy_gbps": 10.0}
    shape = {"B": 8, "D": 4, "F": 64, "K": 2}
    step = {"bench": "train_step", "case": "c", **shape, "dead": 0.0, "usage": "uniform"}
    step |= {**limits, "ms_p50": 2.0, "over_gemm": 1.1, "over_fastsae": 1.0, "peak_mib": 3, **here}
    point = step | {"bench": "scaling", "axis": "F"}
    op = {"bench": "ops", "case": "c", "op": "row_adam", "ms_p50": 1.0, "over_ours": 1.0}
    op |= {"roofline": 0.9, "floor_ms": 0.9, **limits, **here}
    job = {"bench": "end_to_end", "case": "c", "F": 64, "K": 2, "provider": "fastsae", "tokens": 9}
    return [
        step | {"provider": "fastsae"},
        step | {"provider": "sae-lens", "over_fastsae": 6.5},
        step | {"provider": "absent", "failed": "not installed: pip install it"},
        *(point | {"provider": "fastsae", "value": f, "F": f, "ms_p50": f / 32} for f in (64, 128)),
        op | {"provider": "eager"},
        op | {"provider": "rival", "roofline": 0.5},
        job | {"seconds": 2.0, "tokens_per_second": 4.5, "fvu": 0.25, **here},
    ]


def test_the_report_has_a_table_and_a_picture_of_every_level(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, made_rows())))
    text = report.write(tmp_path, [file]).read_text()
    assert "| sae-lens | 2.0 | 1.1 | 6.5 | 3 |" in text
    assert "Not timed: absent, not installed: pip install it." in text
    assert "## The whole job" in text and "| fastsae | 9 | 2.0 | 4.5 | 0.25 |" in text
    for name in ("steps", "scaling", "memory", "roofline"):
        assert f"images/bench-{name}.png" in text
        for kind in ("png", "svg"):
            assert (tmp_path / "images" / f"bench-{name}.{kind}").stat().st_size > 1000


def test_the_page_shows_the_newest_figures_of_a_gpu():
    here = {"device": "a GPU", "threads": 1, "torch": "2", "sae-lens": None, "eai-sparsify": None}
    here["date"] = "2026-01-01T00:00:00Z"
    step = {"bench": "gpu_step", "case": "c", "provider": "fastsae", **here, "over_floor": 1.25}
    failed = {"bench": "gpu_check", "check": "two", "passed": False, **here}
    text = "\n".join(gpu_lines([{**step, "ms": 9.0}, failed, {**step, "ms": 3.14159}]))
    assert "| c | fastsae | 3.142 | 1.25 |" in text and "9.0" not in text
    assert "0 of 1 checks passed" in text and "Failed: two." in text
    assert gpu_lines([]) == []


def test_each_gpu_has_tables_of_its_own():
    shared = {"threads": 1, "torch": "2", "sae-lens": None, "eai-sparsify": None}
    step = {"bench": "gpu_step", "case": "c", "provider": "fastsae", "over_floor": 1.25, **shared}
    old = {**step, "device": "old", "date": "2026-01-01T00:00:00Z", "ms": 7.0}
    new = {**step, "device": "new", "date": "2026-01-02T00:00:00Z", "ms": 5.0}
    text = "\n".join(gpu_lines([new, old]))
    first, second = text.split("### new")[1].split("### old")
    assert "| 5.0 |" in first and "| 7.0 |" not in first
    assert "| 7.0 |" in second and "| 5.0 |" not in second


def made_ops(**changed):
    """Ours, the oracle, a part of the work and two rivals of one op."""
    shared = {"bench": "ops", "op": "topk_encode", "case": "c", "device": "d", "threads": 2}
    shared |= {"date": "2026-01-02T00:00:00Z", **changed}
    times = {"eager": 4.0, "reference": 1.0, "mm": 1.0, "slow": 9.0, "quick": 6.0}
    return [
        shared | {"provider": name, "ms_p50": ms, "over_ours": ms / 4, "roofline": 0.5}
        for name, ms in times.items()
    ]


def test_the_figures_of_an_op_are_ours_and_the_best_rival_of_the_newest_run():
    old = [r | {"ms_p50": 77.0, "date": "2026-01-01T00:00:00Z"} for r in made_ops()]
    before = made_ops(device="another", date="2025-01-01T00:00:00Z")
    triton = made_ops(device="gpu")[0] | {"provider": "triton", "ms_p50": 3.0}
    lines = op_figures([*before, *old, *made_ops()], [triton, *made_ops(device="gpu")])
    assert "| topk_encode | gpu, c | 3.0 | 0.5 | quick | 1.5 |" in lines
    assert "| topk_encode | d, c | 4.0 | 0.5 | quick | 1.5 |" in lines
    assert sum(line.startswith("| topk_encode") for line in lines) == 2
    failed = made_ops()[0] | {"failed": "out of memory"}
    assert not any(line.startswith("| topk_encode") for line in op_figures([failed], []))


def test_an_op_without_a_floor_is_held_to_todays():
    row = {"B": 8, "D": 4, "F": 64, "K": 2, "gemm_gflops": 1.0, "copy_gbps": 1.0, "cuda": "13"}
    row |= {"bench": "ops", "op": "sparse_decode", "case": "c", "ms_p50": 1.0, "roofline": 3.0}
    assert with_floor(row)["bytes"] == 2 * 4 * 2 * 8 + 4 * 8 * 4
    assert with_floor(row | {"cuda": None})["bytes"] == 4 * 4 * 2 * 8 + 4 * 8 * 4
    assert with_floor(row)["roofline"] < 0.1
    for kept in (row | {"floor_ms": 3.0}, row | {"bench": "train_step"}):
        assert with_floor(kept) == kept


def test_committed_pictures_were_drawn_from_the_committed_rows(tmp_path):
    drawn = plots.draw(tmp_path, committed("cpu"), committed("gpu"))
    for name in drawn:
        file = f"{plots.PREFIX}{name}.png"
        made, kept = (_description(folder / file) for folder in (tmp_path, report.IMAGES))
        assert made == kept, f"{file} is older than the rows: python -m bench report"


def _description(path):
    """The digest that a picture carries."""
    found = re.search(rb"Description\x00([0-9a-f]{16})", path.read_bytes())
    assert found is not None
    return found.group(1)
