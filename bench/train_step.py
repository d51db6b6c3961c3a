"""One whole training step, Adam and counters included, against its rivals in one process.

python -m bench.train_step                              # smollm2-135m-16k, every provider
python -m bench.train_step --case smollm2-135m-65k --dead 0.05
python -m bench.train_step --providers fastsae mine.py:step   # and somebody else's
python -m bench.train_step --peers                      # other libraries only
python -m bench.train_step --memory             # peak temporary memory, 65k and 262k latents
python -m bench.train_step --shards FOLDER      # on rows that `fastsae harvest` wrote

Every provider starts from the same weights. One whose losses differ, that is not installed or that
runs out of memory becomes a row that says so, and is not timed.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Start, batch, find_case, rows, shape_of
from bench.measure import (
    OUT_OF_MEMORY,
    differs,
    interleaved,
    out_of_memory,
    peak_extra_bytes,
    peak_mib,
    quantiles,
    times_as_long,
    why,
)
from bench.providers import GPU_PEERS, PEERS, PROVIDERS, fastsae_step, find_provider
from bench.providers.base import Provider, Step
from bench.record import append
from bench.roofline import ceilings, four_digits, step_work
from fastsae_kernels import release_scratch, workspace

CASE = "smollm2-135m-16k"
MEMORY_CASES = ("smollm2-135m-65k", "smollm2-135m-262k")
MEMORY_WORKSPACE = 32 << 20

LEAST_SECONDS = 5.0
"""Of all turns together, on a CPU."""

Row = dict[str, Any]


def times(
    case: Case,
    providers: list[str],
    repeats: int,
    dead: float = 0.0,
    *,
    skewed: bool = False,
    device: str = "cpu",
    shards: Path | None = None,
    draw: int = 0,
) -> list[Row]:
    """A row a provider, the first of them being the anchor, and one for the plain encoder GEMM.

    Args:
        draw: of how many it is. Another order of the turns; after the first, parity, peaks and
            ceilings are known: a step to warm up, and times alone.
        shards: a harvest that the rows are drawn from, which the case's name then says.

    Raises:
        FileNotFoundError: `shards` is no harvest.
        ValueError: a provider is neither known nor a function of a file, or `shards` does not hold
            B rows of width D.
    """
    found = {name: find_provider(name) for name in providers}
    shared = described(case, dead, skewed, shards)
    taken: dict[str, Taken] = {}
    failed: dict[str, Row] = {}
    try:
        start = Start.random(case, dead, skewed=skewed, device=device)
        x = batch(case, shards).to(device)
        for name, provider in found.items():
            one = first_steps(provider, start, x, draw)
            if draw == 0 and isinstance(one, Taken):
                anchor = taken.get(providers[0], one)
                one = differs(one.losses, anchor.losses, device) or one
            if isinstance(one, Taken):
                taken[name] = one
            elif not taken and one != OUT_OF_MEMORY:
                raise RuntimeError(f"{name} must run for others to be compared with it: {one}")
            else:
                failed[name] = {**shared, "provider": name, "failed": one}
                if not taken:
                    return [*failed.values()]
        return [*_timed(shared, taken, case, start, x, repeats, draw), *failed.values()]
    except Exception as failure:
        if not out_of_memory(failure):
            raise
        return [*_none_fits(shared, [n for n in providers if n not in failed]), *failed.values()]


def described(case: Case, dead: float, skewed: bool, shards: Path | None) -> Row:
    """What all rows of these steps say."""
    shape = shape_of(case if shards is None else replace(case, name=f"{case.name}-harvested"))
    usage = "skewed" if skewed else "uniform"
    return {"bench": "train_step", **shape, "dead": dead, "usage": usage}


def _none_fits(shared: Row, providers: Iterable[str]) -> list[Row]:
    return [{**shared, "provider": name, "failed": OUT_OF_MEMORY} for name in providers]


@dataclass(frozen=True)
class Taken:
    """A step that was taken already."""

    step: Step
    losses: list[float]
    """Of the first, and before the first draw's times of two more."""
    peak: Row
    """Of the third; nothing where it is not known."""


def first_steps(provider: Provider, start: Start, x: Tensor, draw: int) -> Taken | str:
    """Those of one provider, or why they were not taken.

    The third loss has been through two updates, so a wrong gradient shows; rivals that treat the
    decoder otherwise (sparsify projects its gradient) differ there in the third digit.
    """
    install = provider.missing()
    if install is not None:
        return f"not installed: {install}"
    losses, peak = list[float](), Row()
    try:
        step = provider.build(start)
        take = lambda: losses.append(step(x))
        take()
        if draw == 0:
            take()
            peak = peak_mib(take, x.device.type)
            if not peak:  # a system that does not tell took no step
                take()
    except Exception as failure:
        return why(failure)
    return Taken(step, losses, peak)


def _timed(
    shared: Row,
    taken: dict[str, Taken],
    case: Case,
    start: Start,
    x: Tensor,
    repeats: int,
    draw: int,
) -> list[Row]:
    """Rows of steps that were all taken already, the first being the anchor, and of the GEMM."""
    device, anchor = start.device.type, next(iter(taken))
    runs: dict[str, Callable[[], object]] = {n: partial(t.step, x) for n, t in taken.items()}
    runs |= _products(case, start, x)
    limits = {} if draw else ceilings(case, device)
    warm_up, least = (1, 0.0) if device == "cuda" else (0, LEAST_SECONDS)
    seconds = interleaved(runs, repeats, warm_up, device, least, draw)
    gemm = min((seconds["gemm"], seconds["gemm-row-major"]), key=statistics.median)
    work = step_work(case, half=device == "cuda")
    timed = []
    for name, s in seconds.items():
        row = {**shared, "provider": name, **quantiles(s)}
        row["over_gemm"] = round(times_as_long(s, gemm), 3)
        row["over_fastsae"] = round(times_as_long(s, seconds[anchor]), 3)
        if name in taken and draw == 0:
            row |= work.row(row["ms_p50"], limits) | taken[name].peak
        timed.append(row | limits)
    return timed


def pooled(
    draws: int,
    case: Case,
    providers: list[str],
    repeats: int,
    dead: float = 0.0,
    *,
    skewed: bool = False,
    shards: Path | None = None,
) -> list[Row]:
    """`times` in so many fresh processes, one after another; figures are medians over them.

    Where its memory happens to lie makes all steps of one process some percent faster or slower
    than those of the next: more turns in the same process do not average that out. Parity is
    checked in the first, and what fails there is not run again.
    """
    by_provider: dict[str, list[Row]] = {}
    for draw in range(draws):
        run = partial(times, skewed=skewed, shards=shards, draw=draw)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            try:
                found = fresh.submit(run, case, providers, repeats, dead).result()
            except BrokenProcessPool:  # the system ends who asks for too much
                found = _none_fits(described(case, dead, skewed, shards), providers)
        for row in found:
            by_provider.setdefault(row["provider"], []).append(row)
        if "failed" in by_provider[providers[0]][-1]:  # nothing to compare the others with
            break
        providers = [name for name in providers if "failed" not in by_provider[name][-1]]
    return [{**median_of(rows), "processes": draws} for rows in by_provider.values()]


def median_of(rows: list[Row]) -> Row:
    """Of one provider, its quantiles over the rows; the one that says why it was not timed."""
    for row in rows:
        if "failed" in row:
            return row
    median = lambda name: four_digits(statistics.median(r[name] for r in rows if name in r))
    figures = {name: median(name) for name, value in rows[0].items() if isinstance(value, float)}
    found = {**rows[0], **figures, **quantiles([row["ms_p50"] / 1e3 for row in rows])}
    if "floor_ms" in found:
        found["roofline"] = round(found["floor_ms"] / found["ms_p50"], 3)
    return found


def _products(case: Case, start: Start, x: Tensor) -> dict[str, Callable[[], object]]:
    """The encoder's product alone, in either memory order of the weight and into a fresh output."""
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    left, weight = x.to(dtype), start.W_enc.to(dtype)
    row_major = weight.contiguous()
    out = torch.empty(case.B, case.F, dtype=dtype, device=x.device)
    return {
        "gemm": lambda: torch.mm(left, weight),
        "gemm-row-major": lambda: torch.mm(left, row_major),
        "gemm-out": lambda: torch.mm(left, weight, out=out),
    }


def memory(case: Case) -> list[Row]:
    """Peak bytes of a step beyond parameters, moments and three [B, D] fp32 tensors."""
    x = rows(case)
    with workspace(MEMORY_WORKSPACE):
        step = fastsae_step(Start.random(case))
        step(x)
        # What else the process touches for the first time can only add to a measurement.
        peak = min(_peak(step, x) for _ in range(3)) - 3 * x.numel() * 4
    dense = 4 * case.B * case.F
    allowed = MEMORY_WORKSPACE + 0.02 * dense
    return [
        {
            "bench": "train_step_memory",
            "case": case.name,
            "provider": "fastsae",
            "B": case.B,
            "F": case.F,
            "workspace_mib": MEMORY_WORKSPACE >> 20,
            "peak_temporary_mib": round(peak / 2**20, 1),
            "allowed_mib": round(allowed / 2**20, 1),
            "dense_latents_mib": round(dense / 2**20, 1),
        }
    ]


def _peak(step: Step, x: Tensor) -> int:
    release_scratch()
    return peak_extra_bytes(partial(step, x))


def summary(rows: list[Row]) -> str:
    """How often each peer's step holds the first row's, and SAELens's the accelerated one."""
    over = {row["provider"]: row["over_fastsae"] for row in rows if "failed" not in row}
    first = rows[0]["provider"]
    ratios = [f"{over[p]:.2f} x over {p}" for p in GPU_PEERS if p in over and p != first]
    said = f"{first}: {', '.join(ratios) or 'no other library is here to compare with'}"
    if {"sae-lens", "sae-lens-accelerated"} <= over.keys():
        said += f"; accelerated SAELens: {over['sae-lens'] / over['sae-lens-accelerated']:.2f} x"
    return said


SHOWN = ("provider", "ms_p20", "ms_p50", "ms_p80", "over_gemm", "over_fastsae", "roofline")
SHOWN += ("peak_mib",)


def show(found: list[Row], columns: tuple[str, ...] = SHOWN) -> None:
    cells = [[str(row.get(c, "")) for c in columns] for row in found if "failed" not in row]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(map(str.rjust, line, widths)))
    for row in found:
        if "failed" in row:
            print(f"{row['provider']:>{widths[0]}}  not timed, {row['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", help=f"{CASE}; of the memory {' and '.join(MEMORY_CASES)}")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS))
    parser.add_argument("--peers", action="store_true", help=", ".join(PEERS))
    parser.add_argument("--batch-size", type=int, help="rows B, where not the case's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents taken for dead")
    parser.add_argument("--usage", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shards", type=Path, help="harvest that the rows are drawn from")
    parser.add_argument("--memory", action="store_true", help="peak temporary memory instead")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    try:
        case = find_case(args.case or CASE)
        if args.batch_size is not None:
            case = replace(case, B=args.batch_size, name=f"{case.name}-b{args.batch_size}")
        run = functools.partial(
            times, skewed=args.usage == "skewed", device=args.device, shards=args.shards
        )
        peers = GPU_PEERS if args.device == "cuda" else PEERS
        providers = peers if args.peers else args.providers
        if args.memory:
            cases = [case] if args.case else map(find_case, MEMORY_CASES)
            found = [row for one in cases for row in memory(one)]
        else:
            print(f"{case.name}: B={case.B} D={case.D} F={case.F} K={case.K}, dead {args.dead:.0%}")
            found = run(case, providers, args.repeats, args.dead)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    show(found, tuple(found[0])[1:] if args.memory else SHOWN)
    if args.peers:
        print(summary(found))
    if args.save:
        print(f"appended to {append(args.save, found, args.device)}")


if __name__ == "__main__":
    main()
