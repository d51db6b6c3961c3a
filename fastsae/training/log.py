"""A run's log: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from fastsae.files import replacing


class RunLog:
    """Appends to `path`, or keeps nothing when it is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, values: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:  # of a full disk it does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def last(self) -> dict[str, Any]:
        """The newest line; empty where there is none."""
        lines = read_log(self.path) if self.path is not None and self.path.exists() else []
        return lines[-1] if lines else {}

    def truncate(self, step: int) -> None:
        """Drop the lines past a checkpoint's step: they will be written again."""
        if self.path is None or not self.path.exists():
            return
        with replacing(self.path) as temporary:
            lines = [json.dumps(v) for v in read_log(self.path) if v["step"] <= step]
            temporary.write_text("".join(line + "\n" for line in lines))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut short by a kill is left out."""
    values = []
    for line in path.read_text().splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values
