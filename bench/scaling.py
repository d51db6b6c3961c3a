"""What a step costs against F, B, D and K, and the model fitted to it.

    python -m bench.scaling                      # each axis in turn, from one middle case
    python -m bench.scaling --axes F K --providers fastsae sae-lens
    python -m bench.scaling --device cuda --save gpu     # F to a million

A step is modelled as t = a B D F + b F D + c B K D + d: the encoder's product, the optimizer's
pass over the dictionary, the gathers, and a constant; a to d are at least 0.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.cases import Case
from bench.record import append
from bench.train_step import times

MIDDLE = Case("scaling", 1024, 512, 16_384, 32)
AXES: dict[str, tuple[int, ...]] = {
    "F": (4096, 16_384, 65_536, 262_144),
    "B": (256, 1024, 4096),
    "D": (256, 512, 1024),
    "K": (8, 32, 128),
}
ON_A_GPU = {**AXES, "F": (*AXES["F"], 1_048_576)}
DENSE_LIMIT = 65_536
"""Latents from which on rivals that write [B, F] are left out: they would take the whole time."""
Row = dict[str, Any]


def curves(providers: Mapping[str, list[str]], repeats: int, device: str = "cpu") -> list[Row]:
    """Of the providers of each axis, ours first; no case is measured twice for the same ones."""
    found: list[Row] = []
    measured: dict[Case, list[Row]] = {}
    for axis, names in providers.items():
        for value in (ON_A_GPU if device == "cuda" else AXES)[axis]:
            case = replace(MIDDLE, **{axis: value})
            mine = names[:1] if case.F >= DENSE_LIMIT else names
            if not set(mine) <= {row["provider"] for row in measured.get(case, [])}:
                measured[case] = times(case, mine, repeats, device=device)
            name = {"bench": "scaling", "case": f"scaling-{axis}-{value}"}
            for row in measured[case]:
                found.append({**row, **name, "axis": axis, "value": value})
                if "ms_p50" in row:
                    took = f"{row['ms_p50']:12.1f} ms"
                    print(f"{axis}={value:<8} {row['provider']:24}{took}", flush=True)
    return found


def terms(row: Row) -> list[float]:
    """Of the model, in units that make its coefficients milliseconds."""
    B, D, F, K = row["B"], row["D"], row["F"], row["K"]
    return [B * D * F / 1e9, F * D / 1e6, B * K * D / 1e6, 1.0]


def fit(rows: list[Row]) -> list[float]:
    """a, b, c, d >= 0 that minimise the sum of squared relative errors over the rows.

    By leaving out, one after another, the term whose coefficient would be the most negative.
    """
    wanted = np.array([row["ms_p50"] for row in rows])
    design = np.array([terms(row) for row in rows]) / wanted[:, None]
    kept = list(range(design.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(design[:, kept], np.ones(len(rows)), rcond=None)
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    coefficients = np.zeros(design.shape[1])
    coefficients[kept] = found
    return coefficients.tolist()


def predicted(row: Row, coefficients: list[float]) -> float:
    """Milliseconds."""
    return float(np.dot(terms(row), coefficients))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--providers", nargs="+", default=["fastsae", "sae-lens"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    try:
        found = curves({axis: args.providers for axis in args.axes}, args.repeats, args.device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    ours = [row for row in found if row["provider"] == args.providers[0] and "ms_p50" in row]
    a, b, c, d = fit(ours)
    print(f"{args.providers[0]}: {a:.3g} ms a billion B D F, {b:.3g} ms a million F D,")
    print(f"{c:.3g} ms a million B K D, {d:.3g} ms")
    if args.save:
        print(f"appended to {append(args.save, found, args.device)}")


if __name__ == "__main__":
    main()
