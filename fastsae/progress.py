"""The progress line of a command."""

from __future__ import annotations

from typing import Any

from fastsae.extras import require


class ProgressBar:
    """A progress line a stage: what is done, the rate, the time left and the figures."""

    SHOWN = ("loss", "fvu", "l0", "dead")

    def __init__(self) -> None:
        self._stage, self._bar = "", None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
        if stage != self._stage or self._bar is None:
            self.__exit__()
            tqdm = require("tqdm.auto", "train").tqdm
            self._stage = stage
            # What was there before the first call, as on resuming, took this process no time.
            options = {"initial": done, "total": total or None, "desc": stage}
            self._bar = tqdm(**options, unit="tok", unit_scale=True)
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix({k: f"{figures[k]:.4g}" for k in self.SHOWN if k in figures})
