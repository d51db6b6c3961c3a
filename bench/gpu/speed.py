"""Times, each with its ceilings and rivals measured in the same process."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any, cast

import torch
from torch import Tensor

from bench import ops
from bench.cases import Case, rows, shape_of
from bench.gpu.harness import (
    DEVICE,
    DRY,
    Report,
    Row,
    Scale,
    dictionary,
    free_memory,
    gibibytes,
    kernels_of,
    normal,
    seconds_of,
    step_seconds,
)
from bench.gpu.step import FusedStep, Step, bag_step, dense_step, trainer_step
from bench.measure import OUT_OF_MEMORY, Run, differs, out_of_memory, peak_mib, quantiles
from bench.rivals import OPS, Inputs
from bench.roofline import Work, ceilings, step_work
from fastsae_kernels import Impl, topk_encode

COLUMNS = 131_072
"""A product with more columns is measured in parts of so many: its output would not fit."""
PEER_SECONDS = 8
"""To import a library, build its SAE and take its steps."""
OPTIMIZER_BYTES = 26
"""Of a parameter: fp32 weight and moments read and written, bf16 copy written."""

SLOW_OPS = {"relu_l1_loss fwd+bwd": 15}
"""Seconds of an op with its rivals where they are more than four: here five products in fp32."""


def tiles() -> list[Any]:
    from fastsae_kernels.topk import groups

    return list(groups.HALF_TILES if not DRY else groups.HALF_TILES[:1])


@contextmanager
def forced_tile(tile: Any) -> Iterator[None]:
    """Encode with this tile instead of the one of the table."""
    from fastsae_kernels._triton import padded
    from fastsae_kernels.topk import groups

    chosen = groups.choose_tile
    groups.choose_tile = lambda x, W_enc, limited: tile._replace(
        rows=min(tile.rows, padded(len(x)))
    )
    try:
        yield
    finally:
        groups.choose_tile = chosen


@torch.no_grad()
def encode(scale: Scale, report: Report) -> None:
    for case in scale.encode:
        if report.enough_time(10, f"encode at {case.name}"):
            _encode_case(case, scale.repeats, report)
        free_memory()


def _encode_case(case: Case, repeats: int, report: Report) -> None:
    x = rows(case).to(DEVICE).bfloat16()
    weight = dictionary(case.F, case.D, seed=1)
    half, bias = weight.bfloat16(), 0.01 * normal(case.F, seed=2)
    scores = torch.empty(case.B, case.F, dtype=torch.bfloat16, device=DEVICE)
    narrow = bias.bfloat16()
    ramp = torch.arange(case.F, dtype=torch.float32, device=DEVICE)

    def ours(bias: Tensor = bias) -> object:
        return topk_encode(x, weight.t(), bias, case.K, W_compute=half.t(), impl=Impl.TRITON)

    def by_tile(tile: Any) -> Run:
        def run() -> object:
            with forced_tile(tile):
                return ours()

        return run

    def plain() -> object:
        return torch.addmm(narrow, x, half.t(), out=scores).relu_().topk(case.K, dim=1)

    runs: dict[str, Run] = {
        "cuBLAS": lambda: torch.mm(x, half.t(), out=scores),
        "cuBLAS + torch.topk": plain,
        "ours": ours,
        "ours, rising columns": lambda: ours(ramp),
        "eager": lambda: topk_encode(
            x, weight.t(), bias, case.K, W_compute=half.t(), impl=Impl.EAGER
        ),
    }
    runs |= {_tile_name(tile): by_tile(tile) for tile in tiles()}
    runs = _that_run(runs, report)
    alike = ("cuBLAS + torch.topk", "eager", *map(_tile_name, tiles()))
    for name, said in _unlike(runs, "ours", alike).items():
        row = {"bench": "gpu_encode", **shape_of(case), "provider": name, "failed": said}
        report.measured(row, f"{case.name:22}{name:34} not timed, {said}")
        del runs[name]
    samples = seconds_of(runs, repeats)
    seconds = {name: median(turns) for name, turns in samples.items()}
    flop = 2 * case.B * case.D * case.F
    work = Work(flop, 0.0)
    product = {"gemm_gflops": flop / seconds["cuBLAS"] / 1e9, "copy_gbps": math.inf}
    for name, s in seconds.items():
        over = s / seconds["cuBLAS"]
        row = {"bench": "gpu_encode", **shape_of(case), "provider": name, "ms": 1e3 * s}
        row |= quantiles(samples[name])
        row |= work.row(1e3 * s, product) | _peak(runs[name])
        row |= {"tflops": flop / s / 1e12, "over_cublas": over, "roofline": 1 / over}
        report.measured(
            row,
            f"{case.name:22}{name:34}{1e3 * s:9.3f} ms {flop / s / 1e12:7.0f} TFLOP/s"
            f"{over:7.2f} x cuBLAS {1 / over:6.1%} of it",
        )
    for name in ("ours", *map(_tile_name, tiles())):
        if name in seconds:
            _launches(report, case, name, runs[name])


def _unlike(runs: dict[str, Run], anchor: str, names: tuple[str, ...]) -> dict[str, str]:
    """What a row says of each whose activations, in order, are not the anchor's."""
    # First of a SparseCode as of what torch.topk returns.
    values = lambda name: cast(tuple[Tensor, ...], runs[name]())[0].float().sort(dim=1).values
    expected, allowed = values(anchor), ops.PARITY[torch.bfloat16]
    said = {n: ops.op_differs(values(n), expected, False, allowed) for n in names if n in runs}
    return {name: why for name, why in said.items() if why is not None}


def _peak(run: Run) -> Row:
    return {} if DRY else peak_mib(run, DEVICE)


def _tile_name(tile: Any) -> str:
    return "tile " + "x".join(str(part) for part in tile)


def _that_run(runs: dict[str, Run], report: Report) -> dict[str, Run]:
    """Without those that fail: a tile too large for a GPU, a rival that does not fit."""
    working = {}
    for name, run in runs.items():
        try:
            run()
            if not DRY:
                torch.cuda.synchronize()
            working[name] = run
        except Exception as failure:
            _must_be_usable(failure)
            if name == "ours":
                raise
            report.note(f"{name} left out: {type(failure).__name__}: {str(failure)[:200]}")
            free_memory()
    return working


def _must_be_usable(failure: Exception) -> None:
    """A kernel that failed on the device leaves nothing to go on with in this process."""
    if "CUDA error" in str(failure) or "AcceleratorError" in type(failure).__name__:
        raise failure


def _launches(report: Report, case: Case, name: str, run: Run) -> None:
    for kernel, ms in list(kernels_of(run).items())[:8]:
        row = {"bench": "gpu_launch", **shape_of(case), "provider": name, "kernel": kernel[:80]}
        report.measured({**row, "ms": ms}, f"    {name:34}{kernel[:60]:62}{ms:9.3f} ms")


def every_op(scale: Scale, report: Report) -> None:
    for case in scale.ops:
        # The dense oracle takes the time of all the others together, and compiling costs seconds.
        leave_out = ("reference",) if case is scale.ops[0] else ("reference", "torch.compile")
        limits = ceilings(case, DEVICE)
        report.measured(
            {"bench": "gpu_ceilings", **shape_of(case), **limits},
            f"ceilings at {case.name}: {limits}",
        )
        inputs = Inputs(case, DEVICE)
        for name in OPS:
            if not report.enough_time(SLOW_OPS.get(name, 4), f"{name} at {case.name}"):
                continue
            try:
                found = ops.times(name, inputs, scale.repeats, limits, leave_out)
            except Exception as failure:
                _must_be_usable(failure)
                report.check(f"{name} runs", False, why=str(failure).splitlines()[0][:200])
                continue
            for row in found:
                report.measured({**row, **limits}, f"{case.name:20}{ops.line_of(row)}")
            free_memory()
        del inputs
        free_memory()


def steps(scale: Scale, report: Report) -> None:
    for case in scale.steps:
        needed = case.F * case.D * 28 / 2**30 + 8
        if not report.enough_time(12, f"steps at {case.name}"):
            continue
        if gibibytes() < needed:
            _left_out(case, "fastsae", f"{OUT_OF_MEMORY}: needs {needed:.0f} GiB", report)
            continue
        try:
            _steps_at(case, report)
        except torch.OutOfMemoryError:
            _left_out(case, "fastsae", f"{OUT_OF_MEMORY}: needs {needed:.0f} GiB", report)
        free_memory()


def _left_out(case: Case, name: str, said: str, report: Report) -> None:
    row = {"bench": "gpu_step", **shape_of(case), "provider": name, "failed": said}
    report.measured(row, f"{case.name:20}{name:32} not timed, {said}")


def _steps_at(case: Case, report: Report) -> None:
    floor = _floor(case, report)
    free_memory()
    x = rows(case).to(DEVICE).bfloat16()
    # Each with the seconds that it takes to build and to run.
    rivals: dict[str, tuple[float, Callable[[], Step]]] = {
        "fastsae": (0, lambda: FusedStep(case, Impl.TRITON)),
        "fastsae.Trainer": (5, lambda: trainer_step(case)),
        "plain PyTorch, embedding_bag": (8, lambda: bag_step(case)),
        "dense PyTorch": (8, lambda: dense_step(case)),
        "dense PyTorch, torch.compile": (50, lambda: dense_step(case, compiled=not DRY)),
    }
    ours: float | None = None
    anchor: list[float] = []
    work = step_work(case, half=True)
    for name, (needed, make) in rivals.items():
        # Dense: masters, gradients and moments, scores and their gradients several times over.
        dense = case.F * case.D * 32 / 2**30 + 6 * case.B * case.F * 4 / 2**30
        if not name.startswith("fastsae") and (
            gibibytes() < dense or not report.enough_time(needed, name)
        ):
            report.note(f"{case.name}: {name} left out; it takes {dense:.0f} GiB")
            continue
        try:
            step = make()
            losses = [float(step(x)) for _ in range(3)]
            anchor = anchor or losses
            # The trainer starts from weights of its own.
            said = None if name.startswith("fastsae") else differs(losses, anchor, "cuda")
            if said is not None:
                _left_out(case, name, said, report)
                step = None
                free_memory()
                continue
            samples = step_seconds(lambda step=step: step(x), 10 if case.F <= COLUMNS else 4)
        except Exception as failure:
            _must_be_usable(failure)
            if out_of_memory(failure) and name == "fastsae":
                raise
            report.check(f"{name} at {case.name} runs", False, why=str(failure)[:300])
            step = None
            free_memory()
            continue
        seconds = mean(samples)
        ours = ours or seconds
        row = {"bench": "gpu_step", **shape_of(case), "provider": name, "ms": 1e3 * seconds}
        row |= quantiles(samples)
        row |= work.row(1e3 * seconds, floor) | _peak(lambda step=step: step(x))
        row |= {**floor, "over_floor": 1e3 * seconds / floor["floor_ms"], "losses": losses}
        row["over_ours"] = seconds / ours
        report.measured(
            row,
            f"{case.name:20}{name:32}{1e3 * seconds:9.2f} ms {row['over_floor']:6.2f} x floor"
            f"{row['over_ours']:7.2f} x ours   losses {losses[0]:.4g} .. {losses[-1]:.4g}",
        )
        if name.startswith("fastsae"):
            _launches(report, case, name, lambda step=step: step(x))
        del step
        free_memory()


def peers(scale: Scale, report: Report) -> None:
    """Training steps of the other libraries; a row of one that is not installed says so."""
    if importlib.util.find_spec("jaxtyping") is None:
        return report.note("other libraries left out: jaxtyping absent")
    # These import fastsae, which that package must be there for.
    from bench import train_step
    from bench.providers import GPU_PEERS, PROVIDERS

    here = [name for name in GPU_PEERS if PROVIDERS[name].missing() is None]
    if not report.enough_time(PEER_SECONDS * len(here), "other libraries"):
        return None
    for row in train_step.times(scale.peers, GPU_PEERS, scale.repeats, device=DEVICE):
        name = f"{row['case']:20}{row['provider']:32}"
        if "failed" in row:
            said = f"not timed, {row['failed']}"
        else:
            said = f"{row['ms_p50']:9.2f} ms{row['over_fastsae']:7.2f} x ours"
        report.measured(row, name + said)


def _floor(case: Case, report: Report) -> dict[str, float]:
    """Milliseconds of one product, the optimizer's bytes and one gather at this GPU's ceilings."""
    limits = ceilings(case, DEVICE)
    columns = min(case.F, COLUMNS)
    gemm = 2e-6 * case.B * case.D * columns / limits["gemm_gflops"] * (case.F / columns)
    optimizer = OPTIMIZER_BYTES * 2 * case.F * case.D / limits["copy_gbps"] / 1e6
    gather = 2 * case.B * case.K * case.D / limits["copy_gbps"] / 1e6
    found = {"gemm_ms": gemm, "optimizer_ms": optimizer, "gather_ms": gather}
    found |= {"floor_ms": gemm + optimizer + gather, **limits}
    report.measured(
        {"bench": "gpu_floor", **shape_of(case), **found},
        f"floor at {case.name}: "
        + ", ".join(
            f"{k} {v:.2f}" if k.endswith("_ms") else f"{k} {v:.0f}" for k, v in found.items()
        ),
    )
    return found
