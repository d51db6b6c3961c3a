"""The rows so far: what was trained is not trained again."""

from collections.abc import Callable

from bench.record import append
from bench.report.rows import Row, committed

FILE = "quality"


def saved() -> list[Row]:
    return committed(FILE)


def once(key: Row, measure: Callable[[], Row]) -> None:
    """Append the row of a key, unless there is one with these fields."""
    if any(all(row.get(name) == value for name, value in key.items()) for row in saved()):
        return
    row = key | measure()
    append(FILE, [row], "cpu")
    print({name: value for name, value in row.items() if name != "curve"}, flush=True)
