"""Committed result rows, and Markdown tables of them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.record import RESULTS
from bench.roofline import op_work

Row = dict[str, Any]
PREFIX = "bench-"
"""Of the names of pictures."""


def read(*files: Path) -> list[Row]:
    """The rows of files that exist, in their order."""
    return [
        with_floor(json.loads(line))
        for path in files
        if path.exists()
        for line in path.read_text().splitlines()
    ]


def with_floor(row: Row) -> Row:
    """The row of an op that states none is held to today's floor, at the ceilings of its run."""
    if row["bench"] != "ops" or "roofline" not in row or "floor_ms" in row:
        return row
    case = Case(row["case"], *(row[size] for size in "BDFK"))
    work = op_work(row["op"], case, 2 if row.get("cuda") else 4)
    return row if work is None else row | work.row(row["ms_p50"], row)


def committed(name: str) -> list[Row]:
    return read(RESULTS / f"{name}.jsonl")


def of(rows: list[Row], bench: str) -> list[Row]:
    return [row for row in rows if row["bench"] == bench]


def by_device(rows: list[Row]) -> list[list[Row]]:
    """The rows of each machine, the one measured last first: times of two do not compare."""
    last = {row["device"]: row["date"] for row in sorted(rows, key=lambda row: row["date"])}
    devices = sorted(last, key=lambda device: last[device], reverse=True)
    return [[row for row in rows if row["device"] == device] for device in devices]


def newest(rows: list[Row], keys: tuple[str, ...]) -> list[Row]:
    """The rows of the newest run of each combination of `keys`; a run has one date."""
    combination = lambda row: json.dumps([row.get(k) for k in keys])
    last = {combination(row): row["date"] for row in rows}
    return [row for row in rows if last[combination(row)] == row["date"]]


def timed(rows: list[Row]) -> list[Row]:
    """Without those that say why they were not."""
    return [row for row in rows if "failed" not in row]


def table(rows: Iterable[Row], columns: dict[str, str]) -> list[str]:
    """Columns of which no row has anything are left out."""
    rows = list(rows)
    shown = {k: head for k, head in columns.items() if any(row.get(k) is not None for row in rows)}
    lines = ["| " + " | ".join(shown.values()) + " |", "|" + "---|" * len(shown)]
    return lines + ["| " + " | ".join(_cell(row.get(k)) for k in shown) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return str(float(f"{value:.4g}"))
    return "" if value is None else str(value)


def failures(rows: list[Row]) -> list[str]:
    """A line for each row that was not timed."""
    return [
        line
        for row in rows
        if "failed" in row
        for line in ("", f"Not timed: {row['provider']}, {row['failed']}.")
    ]


def where(rows: list[Row]) -> str:
    """The machine and the versions of the last row; the commits of all."""
    row = rows[-1]
    packages = ("torch", "triton", "sae-lens", "eai-sparsify", "dictionary-learning")
    versions = ", ".join(f"{k} {row[k]}" for k in packages if row.get(k))
    changed = " and changes" if any(row.get("dirty") for row in rows) else ""
    commits = list(dict.fromkeys(row["commit"] for row in rows if row.get("commit")))
    named = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    commit = f", {named}{changed}" if commits else ""
    return f"{row['device']}, {row['threads']} threads, {versions}{commit}, {row['date'][:10]}"


def digest(rows: list[Row]) -> str:
    """What a picture was drawn from."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
