"""Where a run's log goes besides its file. `TRACKERS` is the one list of them.

A new one is a class with `write` and `close`, and a line in `TRACKERS`.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fastsae.extras import require
from fastsae.files import replacing
from fastsae.training.config import Tracking, TrainConfig


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run when it is opened."""

    project: str
    name: str
    config: dict[str, Any]
    out: Path | None
    steps_done: int
    """Above 0 for a run that is resumed."""

    def id(self) -> str | None:
        """One for all parts of a run that is resumed, kept in its folder."""
        if self.out is None:
            return None
        path = self.out / "run_id"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(uuid.uuid4().hex[:16])
        return path.read_text()


class Tracker(Protocol):
    def write(self, line: dict[str, Any]) -> None:
        """One line of the log."""

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases; WANDB_MODE=offline and its other variables act as ever."""

    def __init__(self, run: Run) -> None:
        wandb = require("wandb", extra="wandb")
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                config=run.config,
                dir=run.out,
                id=run.id(),
                resume="allow",
                reinit="create_new",  # several SAEs of one process are several runs
            )
        except wandb.Error as error:
            raise RuntimeError(f"wandb could not be opened: {error}") from error

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(line, step=line["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Files for TensorBoard in `tensorboard/` beside the log."""

    def __init__(self, run: Run) -> None:
        require("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        if run.out is None:
            raise ValueError("out must be a folder to log to tensorboard, got None")
        folder = run.out / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.steps_done + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio, which keeps runs on this machine: `trackio show`."""

    def __init__(self, run: Run) -> None:
        self._run = require("trackio", extra="trackio").init(
            project=run.project, name=run.name, config=run.config, resume="allow", embed=False
        )

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(line, step=line["step"])

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_installed(log_to: Iterable[Tracking]) -> None:
    """Raise ImportError, which names the extra, before work is done whose log would be lost."""
    for name in log_to:
        require(name, extra=name)


@contextmanager
def trackers_of(cfg: TrainConfig, out: Path | None, steps_done: int) -> Iterator[list[Tracker]]:
    """The trackers that `cfg.log.to` names, open inside the context.

    Raises:
        ImportError: a tracker is not installed; the extra is named.
    """
    name = out.resolve().name if out is not None else cfg.sae.architecture
    run = Run(cfg.log.project, cfg.log.run_name or name, asdict(cfg), out, steps_done)
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for chosen in cfg.log.to:
            tracker = TRACKERS[chosen](run)
            stack.callback(tracker.close)
            opened.append(tracker)
        yield opened
