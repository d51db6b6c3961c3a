"""A language model in processes of its own, beside those that train on its rows.

Each process that trains is served by one that runs the model, with the rows that it would have made
itself, so that who makes them changes no batch. It asks for a batch while it works on an earlier
one: `AHEAD` requests are open at a time, each with room for the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsae.data import load_language_model
from fastsae.distributed.mesh import Mesh
from fastsae.training.row_sources import StreamSource
from fastsae.training.run_config import LanguageModelRun, Progress
from fastsae.training.side_by_side import runs_of

AHEAD = 2
"""Batches that are on their way while one is trained on."""
NEXT, NO_MORE = 1, 0
"""What a process that trains asks for."""
UNTIL_THE_FIRST = timedelta(days=7)
"""Of waiting: a run that goes on has the model make all earlier rows again."""


@dataclass(frozen=True)
class Places:
    """What processes that train know of the model, which they do not load."""

    hooks: Mapping[tuple[int | None, str | None], str]
    """By layer and hook, as runs ask for them."""
    widths: Mapping[str, int]
    metadata: Mapping[str, dict[str, Any]]
    dtype: torch.dtype


def server_of(mesh: Mesh, rank: int) -> int:
    """The process beside a mesh that makes the rows of one in it."""
    return mesh.size + rank % mesh.beside


class ServedSource:
    """Rows that a process beside the mesh makes of a model, which is not in this one's memory."""

    halved: dict[str, str] = {}
    lm = None

    def __init__(self, world: Mesh, mesh: Mesh) -> None:
        self.mesh, self.server = mesh, server_of(mesh, mesh.rank)
        self.places: Places = world.on(mesh.size, _not_here)
        self._samples: dict[str, Tensor] = {}

    def place(self, run: LanguageModelRun) -> str:
        return self.places.hooks[run.layer, run.hook]

    def width(self, hook: str) -> int:
        return self.places.widths[hook]

    def metadata(self, hook: str) -> dict[str, Any]:
        return self.places.metadata[hook]

    def held_bytes(self, hooks: set[str]) -> dict[str, int]:
        return {}  # a few batches

    def read(self, hooks: set[str], tell: Progress) -> None:
        received: list[Any] = [None]
        dist.recv_object_list(received, self.server, device=torch.device("cpu"))
        self._samples = received[0]

    def sample(self, hook: str) -> Tensor:
        return self._samples[hook]

    def batches(
        self, hooks: set[str], batch_size: int, steps: range
    ) -> Generator[dict[str, Tensor]]:
        size = batch_size // self.mesh.size
        dist.send(torch.tensor([size, steps.start, steps.stop]), self.server)
        return self._received(hooks, size, len(steps))

    def _received(self, hooks: set[str], size: int, n_steps: int) -> Generator[dict[str, Tensor]]:
        coming: deque[_Coming] = deque()
        asked, first = 0, True
        try:
            for _ in range(n_steps):
                while asked < n_steps and len(coming) <= AHEAD:
                    coming.append(_Coming(self, hooks, size))
                    asked += 1
                batch = coming[0].wait(UNTIL_THE_FIRST if first else None)
                first = False
                coming.popleft()
                yield batch
        except GeneratorExit:
            with suppress(RuntimeError):  # where the server is lost, which is why this ends
                for one in coming:
                    one.wait(None)
                if asked < n_steps:
                    _send(NO_MORE, self.server)
            raise

    def held_out(self, hook: str) -> None:
        return None


class _Coming:
    """A batch that was asked for."""

    def __init__(self, source: ServedSource, hooks: set[str], size: int) -> None:
        dtype = source.places.dtype
        self.rows = {h: torch.empty(size, source.width(h), dtype=dtype) for h in sorted(hooks)}
        self.works = [dist.irecv(rows, source.server) for rows in self.rows.values()]
        _send(NEXT, source.server)

    def wait(self, timeout: timedelta | None) -> dict[str, Tensor]:
        for work in self.works:
            assert work is not None
            work.wait() if timeout is None else work.wait(timeout)
        return self.rows


class ModelRank:
    """This process runs the model, for some of those that train.

    Args:
        world: all processes.
        mesh: those that train.
    """

    def __init__(
        self, run: LanguageModelRun, device: torch.device, world: Mesh, mesh: Mesh
    ) -> None:
        self.mesh, self.steps_done = mesh, 0
        lm = load_language_model(run.model, device=device)
        self.sources = {
            rank: StreamSource(run, lm, rank, mesh.size, ahead=0)
            for rank in range(mesh.size)
            if server_of(mesh, rank) == world.rank
        }
        self.source = next(iter(self.sources.values()))
        """Of the first that is served: the others differ in which rows they make."""
        runs = runs_of(run).values()
        for source in self.sources.values():
            self.places = {(one.layer, one.hook): source.place(one) for one in runs}
        self.hooks = set(self.places.values())
        world.on(mesh.size, self._places)

    def serve(self) -> None:
        """Make and send the rows of those that are served, until each has what it needs."""
        for rank, source in self.sources.items():
            source.read(self.hooks, lambda *_: None)
            samples = {hook: source.sample(hook) for hook in self.hooks}
            dist.send_object_list([samples], rank, device=torch.device("cpu"))
        going = dict(self._begun(rank, source) for rank, source in self.sources.items())
        while going:
            for rank, batches in [*going.items()]:
                batch = next(batches, None)
                if batch is None or _received(rank) == NO_MORE:
                    going.pop(rank).close()
                    continue
                for _, rows in sorted(batch.items()):
                    dist.send(rows, rank)
            self.steps_done += 1

    def _begun(self, rank: int, source: StreamSource) -> tuple[int, Generator[dict[str, Tensor]]]:
        asked = torch.empty(3, dtype=torch.int64)
        dist.recv(asked, rank)
        size, start, stop = asked.tolist()
        return rank, source.batches(self.hooks, size * self.mesh.size, range(start, stop))

    def _places(self) -> Places:
        return Places(
            self.places,
            {hook: self.source.width(hook) for hook in self.hooks},
            {hook: self.source.metadata(hook) for hook in self.hooks},
            self.source.lm.model.dtype,
        )


def _not_here() -> Places:
    raise AssertionError("a process that runs the model says what its places are")


def _send(number: int, rank: int) -> None:
    dist.send(torch.tensor([number]), rank)


def _received(rank: int) -> int:
    number = torch.empty(1, dtype=torch.int64)
    dist.recv(number, rank)
    return int(number)
