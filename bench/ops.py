"""Every op against the reference and the best plain PyTorch, parity first.

    python -m bench.ops                                   # all ops at smollm2-135m-16k, on a CPU
    python -m bench.ops --op topk_encode --case smollm2-135m-65k
    python -m bench.ops --device cuda --case gemma-2-2b-131k

The ceilings of the machine (GEMM, copy, gather) are measured in the same run. `roofline` is the
time that the op's product and its bytes, each read or written once, take at those ceilings, over
the time measured. On a GPU rows, scores and the copies of the weights that the ops read are bf16.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case, find_case, shape_of
from bench.measure import interleaved, out_of_memory, peak_mib, quantiles, times_as_long, why
from bench.record import append
from bench.rivals import BY_NORM, NO_RIVAL, OPS, Inputs
from bench.rivals.inputs import Run
from bench.roofline import ceilings, op_work
from fastsae_kernels import Impl
from fastsae_kernels._dispatch import interpreted

PARITY = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Relative difference allowed to a rival that computes in that dtype."""

LEAST_SECONDS = 2.0
"""Of all turns together, on a CPU."""

Row = dict[str, Any]


def times(
    name: str,
    t: Inputs,
    repeats: int,
    limits: dict[str, float] | None = None,
    leave_out: tuple[str, ...] = (),
) -> list[Row]:
    """A row a provider, ours first; that of one that fails, or fails parity, says so."""
    case = t.case
    runs = {p: run for p, run in OPS[name](t).items() if p not in leave_out}
    first = next(iter(runs))
    shared = described(name, case)
    anchor: Tensor | None = None
    failed: list[Row] = []
    for provider in list(runs):
        try:
            value = runs[provider]().detach()
            anchor = value.clone() if anchor is None else anchor
            known = provider == first or provider in NO_RIVAL
            said = None if known else op_differs(value, anchor, name in BY_NORM, PARITY[t.dtype])
        except Exception as failure:
            if provider == first and not out_of_memory(failure):
                raise
            said = why(failure)
        if said is not None:
            failed.append({**shared, "provider": provider, "failed": said})
            del runs[provider]
        if first not in runs:
            return failed
    if interpreted():
        runs = {p: run for p, run in runs.items() if p != Impl.TRITON.value}
    try:
        return _timed(shared, runs, t, repeats, limits) + failed
    except Exception as failure:
        if not out_of_memory(failure):
            raise
        return [{**shared, "provider": p, "failed": why(failure)} for p in runs] + failed


def described(name: str, case: Case) -> Row:
    """What all rows of an op say."""
    return {"bench": "ops", "op": name, **shape_of(case)}


def _timed(
    shared: Row, runs: dict[str, Run], t: Inputs, repeats: int, limits: dict[str, float] | None
) -> list[Row]:
    least = 0.0 if t.device == "cuda" else LEAST_SECONDS
    warm_up = 1 if t.device == "cuda" else 0  # each has run once, for its parity
    seconds = interleaved(runs, repeats, warm_up, t.device, least)
    ours = seconds[next(iter(seconds))]
    found = []
    needed = op_work(shared["op"], t.case, t.x.element_size(), t.touched)
    for provider, s in seconds.items():
        row = {**shared, "provider": provider, **quantiles(s)}
        row["over_ours"] = round(times_as_long(s, ours), 2)
        if limits is not None and needed is not None and provider not in NO_RIVAL:
            row |= needed.row(row["ms_p50"], limits)
        if t.device == "cpu":
            row |= peak_mib(runs[provider])
        found.append(row)
    return found


def op_differs(value: Tensor, anchor: Tensor, by_norm: bool, allowed: float) -> str | None:
    error = _difference(value, anchor, by_norm)
    # "Not at or under" rather than "above": NaN is a difference.
    return None if error <= allowed else f"parity: relative error {error:.1e}"


def _difference(value: Tensor, anchor: Tensor, by_norm: bool) -> float:
    """Of the values, relative to the norm of all; or of the norms."""
    size = lambda t: torch.linalg.vector_norm(t, dtype=torch.float64).clamp_min(1e-30)
    norm = size(anchor if anchor.is_floating_point() else anchor.double())
    if by_norm:
        return float((size(value) / norm - 1).abs())
    squares = torch.zeros((), dtype=torch.float64, device=anchor.device)
    shape = (-1, anchor.shape[-1]) if anchor.ndim > 1 else (1, -1)
    # In pieces: a dictionary in fp64 does not fit beside itself on every GPU.
    for a, b in zip(
        value.reshape(shape).split(8192), anchor.reshape(shape).split(8192), strict=True
    ):
        squares += (a.double() - b.double()).square().sum()
    return float(squares.sqrt() / norm)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--case", default="smollm2-135m-16k", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    if interpreted():
        raise SystemExit("TRITON_INTERPRET must be unset: interpreted kernels are not timed")
    try:
        case = find_case(args.case)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    found = told(case, args.op, args.repeats, args.device)
    if args.save:
        print(f"appended to {append(args.save, found, args.device)}")


def told(
    case: Case,
    names: Iterable[str],
    repeats: int,
    device: str = "cpu",
    leave_out: tuple[str, ...] = (),
) -> list[Row]:
    """The rows of these ops, each printed as it is measured."""
    try:
        limits, inputs = ceilings(case, device), Inputs(case, device)
    except Exception as failure:
        if not out_of_memory(failure):
            raise
        ours = (Impl.TRITON if device == "cuda" else Impl.EAGER).value
        said = {"provider": ours, "failed": why(failure)}
        print(f"{case.name}: {why(failure)}")
        return [described(name, case) | said for name in names]
    print(f"{case.name}: B={case.B} D={case.D} F={case.F} K={case.K}; ceilings {limits}")
    found: list[Row] = []
    for name in names:
        for row in times(name, inputs, repeats, limits, leave_out):
            found.append(row | limits)
            print(line_of(row), flush=True)
    return found


def line_of(row: Row) -> str:
    if "failed" in row:
        return f"{row['op']:26}{row['provider']:32} not timed, {row['failed']}"
    share = f"{row['roofline']:9.1%} of the roofline" if "roofline" in row else ""
    return (
        f"{row['op']:26}{row['provider']:32}{row['ms_p50']:10.3f} ms"
        f"{row['over_ours']:8.2f} x ours{share}"
    )


if __name__ == "__main__":
    main()
