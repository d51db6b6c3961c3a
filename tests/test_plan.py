"""`fastsae plan`: against real shards, measured steps, and the page that quotes it."""

import json
from pathlib import Path
from statistics import median

import pytest

import fastsae
from bench.report.rows import committed, of, timed
from fastsae.distributed.mesh import Extent
from fastsae.distributed.plan import GPUS, Plan, fastest, meshes, plan_report, predict, smallest
from fastsae.distributed.shards import LatentShards

ROOT = Path(__file__).parent.parent


def test_the_largest_dictionary_needs_the_fewest_gpus_that_hold_it():
    plan = Plan(d_in=4096, d_sae=16_777_216, gpus=64, batch_size=65_536)
    few = smallest(plan)
    assert few is not None and few.fits
    fewer = [predict(plan, m) for n in range(1, few.mesh.size) for m in meshes(plan, n)]
    assert fewer and not any(found.fits for found in fewer)
    best = fastest(plan, 64)
    assert best is not None and best.tokens_per_second > few.tokens_per_second
    text = plan_report(plan)
    assert f"as few as fit: {few.mesh.size} h200" in text
    assert f"--dp {best.mesh.dp} --tp {best.mesh.tp}" in text


def test_what_does_not_fit_says_what_would():
    with pytest.raises(ValueError, match="gpus must hold the run, got 1 h100 that need"):
        plan_report(Plan(d_in=4096, d_sae=16_777_216, gpu="h100"))
    with pytest.raises(ValueError, match=r"gpus must be dp \* tp and divide batch_size"):
        plan_report(Plan(d_in=64, d_sae=1024, gpus=3))
    with pytest.raises(ValueError, match="k must be at least 1"):
        Plan(d_in=64, d_sae=1024, k=0)


def test_memory_is_that_of_a_real_shard():
    plan = Plan(d_in=16, d_sae=130, k=5, batch_size=64, gpus=4)
    found = predict(plan, Extent(2, 2))
    cfg = plan.config()
    shards = LatentShards(Extent(2, 2), 130)
    sae = fastsae.TopKSAE(cfg.sae, device="meta", shards=shards)
    assert found.memory["weights"] == sum(p.nbytes for p in sae.parameters())


def test_measured_steps_are_near_the_predicted_ones():
    rows = timed(of(committed("gpu"), "gpu_step"))
    measured = [row for row in rows if row["provider"] == "fastsae"]
    assert len(measured) >= 7
    for row in measured:
        gpu = next(name for name in GPUS if name.upper() in row["device"])
        shape = {"d_in": row["D"], "d_sae": row["F"], "k": row["K"], "batch_size": row["B"]}
        plan = Plan(**{**shape, "gpu": gpu})
        assert predict(plan, Extent()).step_seconds * 1e3 == pytest.approx(row["ms"], rel=0.11)


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_rates_are_the_measured_ceilings(gpu):
    lines = (ROOT / "bench/results/gpu.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "gpu_floor"]
    here = [row for row in rows if gpu.upper() in row["device"]]
    for name, rate in (("gemm_gflops", GPUS[gpu].flops), ("copy_gbps", GPUS[gpu].bandwidth)):
        assert rate == pytest.approx(1e9 * median(row[name] for row in here), rel=0.01)


@pytest.mark.parametrize(
    ("name", "gpus", "changes"),
    [
        ("1M", 1, {"batch_size": 8192}),
        ("1M", 8, {}),
        ("16M", 8, {"dtype": "bfloat16", "moments": "8bit"}),
        ("16M", 64, {"batch_size": 131_072}),
        ("128M", 64, {"batch_size": 131_072, "dtype": "bfloat16", "moments": "8bit"}),
        ("128M", 256, {"batch_size": 131_072}),
    ],
)
def test_the_page_holds_the_plans_figures(name, gpus, changes):
    shape = {"d_in": 4096, "d_sae": int(name[:-1]) << 20, "micro_batch_size": 8192}
    plan = Plan(**{"batch_size": 65_536, "gpus": gpus, **shape, **changes})
    found = fastest(plan, gpus)
    assert found is not None
    state = {"float32": "fp32", "bfloat16": "bf16", "8bit": "8 bits"}
    memory = sum(found.memory.values()) / 2**30
    row = (
        f"| {name}, B = {plan.batch_size:,} | {state[plan.dtype]}, {state[plan.moments]} | "
        f"{gpus} | {found.mesh.dp} x {found.mesh.tp} | {memory:.0f} GiB | "
        f"{found.step_seconds:.2f} s | {round(found.tokens_per_second, -3):,.0f} |"
    )
    assert row in (ROOT / "docs/large_dictionaries.md").read_text(), row
