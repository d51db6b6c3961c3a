"""The figures of each op: ours, its floor, and the best of plain PyTorch."""

from bench.report.rows import Row, by_device, of, table, timed, where
from bench.rivals import NO_RIVAL, OPS
from fastsae_kernels import Impl

COLUMNS = {
    "op": "op",
    "place": "where",
    "ms_p50": "ours, ms",
    "roofline": "share of the roofline",
    "rival": "best of plain PyTorch",
    "times": "times ours",
}
NOT_RIVALS = {*NO_RIVAL, *(impl.value for impl in Impl)}


def op_figures(cpu: list[Row], gpu: list[Row]) -> list[str]:
    """A line an op and case, of the GPU and of the CPU that were measured last."""
    machines = [_newest(rows) for rows in (gpu, cpu)]
    found = [line for op in OPS for rows in machines for line in _of_op(op, rows)]
    return [*table(found, COLUMNS), *(s for rows in machines if rows for s in ("", where(rows)))]


def _newest(rows: list[Row]) -> list[Row]:
    """Of the last machine, the last row of each case, op and provider."""
    mine = next(iter(by_device(of(rows, "ops"))), [])
    return timed(list({(r["case"], r["op"], r["provider"]): r for r in mine}.values()))


def _of_op(op: str, rows: list[Row]) -> list[Row]:
    found = []
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = {r["provider"]: r for r in rows if (r["op"], r["case"]) == (op, case)}
        ours = mine.get(Impl.TRITON.value) or mine.get(Impl.EAGER.value)
        if ours is None:
            continue
        rivals = [r for name, r in mine.items() if name not in NOT_RIVALS]
        line = ours | {"place": f"{ours['device']}, {case}"}
        for best in sorted(rivals, key=lambda r: r["ms_p50"])[:1]:
            line |= {"rival": best["provider"], "times": best["over_ours"]}
        found.append(line)
    return found
