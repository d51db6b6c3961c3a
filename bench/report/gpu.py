"""What `python -m bench.gpu_check` found on a GPU."""

from collections.abc import Callable

from bench.report.rows import Row, by_device, table, timed, where

TABLES = {
    "gpu_step": {
        "case": "case",
        "provider": "provider",
        "ms": "ms",
        "floor_ms": "floor ms",
        "over_floor": "over floor",
        "over_ours": "over fastsae",
    },
    "train_step": {
        "case": "case",
        "provider": "trainer",
        "ms_p50": "median ms",
        "over_fastsae": "over fastsae",
        "roofline": "share of the roofline",
        "peak_mib": "temporary MiB",
    },
    "gpu_encode": {
        "case": "case",
        "provider": "provider",
        "ms": "ms",
        "tflops": "TFLOP/s",
        "over_cublas": "over cuBLAS",
    },
    "scaling": {
        "case": "case",
        "provider": "provider",
        "ms_p50": "median ms",
        "over_gemm": "over GEMM",
        "roofline": "share of the roofline",
    },
    "ops": {
        "case": "case",
        "op": "op",
        "provider": "provider",
        "ms_p50": "median ms",
        "over_ours": "over ours",
        "roofline": "share of the roofline",
    },
}


def gpu_lines(rows: list[Row], picture: Callable[[str], list[str]] = lambda _: []) -> list[str]:
    """The newest row of each case and provider, and the checks that ran with them."""
    if not rows:
        return []
    lines = ["", "## On a GPU", "", "`python -m bench.gpu_check`: times are device times. The"]
    lines += ["floor of a step is one cuBLAS product of the encoder's shape, the optimizer's bytes"]
    lines += ["at the bandwidth of a copy, and one gather, all measured in the same run. Trainers"]
    lines += ["are compared by `python -m bench.train_step --device cuda`, and by the check where"]
    lines += ["other libraries are installed, with what each of them does on the host. An op whose"]
    lines += [
        "rows state no floor is held to today's, its code taken to touch as many latents as it"
    ]
    lines += ["can."]
    lines += picture("gpu")
    for mine in by_device(rows):
        lines += ["", f"### {mine[0]['device']}", *_device_lines(mine), "", where(mine)]
    return lines


def _device_lines(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    checks = {r["check"]: r for r in rows if r["bench"] == "gpu_check"}
    if checks:
        passed = sum(r["passed"] for r in checks.values())
        lines += ["", f"{passed} of {len(checks)} checks passed."]
        lines += [f"Failed: {name}." for name, r in checks.items() if not r["passed"]]
    for bench, columns in TABLES.items():
        keys = ("case", "op", "provider")
        newest = {tuple(r.get(k) for k in keys): r for r in rows if r["bench"] == bench}
        mine = timed([*newest.values()])
        if mine:
            lines += ["", *table(mine, columns)]
    return lines
