"""A language model in processes of its own, beside those that train on its rows.

Each process that trains is served by one that runs the model, with the rows that it would have made
itself, so that who makes them changes no batch. It asks for a batch while it works on an earlier
one: `AHEAD` requests are open at a time, each with room for the answer. The time-out is for these;
loading a model, making all earlier rows again and writing what was trained take as long as they do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
    """Rows that a process beside the mesh makes of a model, which is not in this one's memory.

    Args:
        world: all processes, patient.
        mesh: those that train.
    """

    halved: dict[str, str] = {}
    lm = None

    def __init__(self, world: Mesh, mesh: Mesh) -> None:
        self.world, self.mesh, self.server = world, mesh, server_of(mesh, mesh.rank)
        self.places: Places = world.each(_wait)[mesh.size]
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
        self.world.each(_wait)
        received: list[Any] = [None]
        dist.recv_object_list(received, self.server, device=torch.device("cpu"))
        self._samples = received[0]

    def sample(self, hook: str) -> Tensor:
        return self._samples[hook]

    def batches(
        self, hooks: set[str], batch_size: int, steps: range
    ) -> Generator[dict[str, Tensor]]:
        size = batch_size // self.mesh.size
        wanted = torch.tensor([size, steps.start, steps.stop])
        dist.send(wanted, self.server, self.world.group("world"))
        self.world.each(_wait)
        return self._received(hooks, size, len(steps))

    def _received(self, hooks: set[str], size: int, n_steps: int) -> Generator[dict[str, Tensor]]:
        coming: deque[_Coming] = deque()
        asked = 0
        try:
            for _ in range(n_steps):
                while asked < n_steps and len(coming) <= AHEAD:
                    coming.append(_Coming(self, hooks, size))
                    asked += 1
                yield coming.popleft().wait()
        except GeneratorExit:
            with suppress(RuntimeError):  # where the server is lost, which is why this ends
                for one in coming:
                    one.wait()
                if asked < n_steps:
                    dist.send(torch.tensor([NO_MORE]), self.server)
            raise

    def held_out(self, hook: str) -> None:
        return None


class _Coming:
    """A batch that was asked for."""

    def __init__(self, source: ServedSource, hooks: set[str], size: int) -> None:
        dtype, pinned = source.places.dtype, source.mesh.device.type == "cuda"
        self.rows = {
            hook: torch.empty(size, source.width(hook), dtype=dtype, pin_memory=pinned)
            for hook in sorted(hooks)
        }
        self._asked = torch.tensor([NEXT])
        self._works = [dist.irecv(rows, source.server) for rows in self.rows.values()]
        self._works.append(dist.isend(self._asked, source.server))

    def wait(self) -> dict[str, Tensor]:
        for work in self._works:
            assert work is not None
            work.wait()
        return self.rows


class ModelRank:
    """This process runs the model, for some of those that train.

    Args:
        world: all processes, patient.
        mesh: those that train.
    """

    def __init__(
        self, run: LanguageModelRun, device: torch.device, world: Mesh, mesh: Mesh
    ) -> None:
        self.run, self.device, self.world, self.mesh = run, device, world, mesh
        self.steps_done = 0
        self.sources: dict[int, StreamSource] = {}
        """By the rank that is served."""
        self.hooks: dict[str, str] = {}
        """By the name of an SAE."""
        world.each(self._load)

    @property
    def source(self) -> StreamSource:
        """Of the first that is served: the others differ in which rows they make."""
        return next(iter(self.sources.values()))

    @property
    def places(self) -> set[str]:
        return set(self.hooks.values())

    def serve(self) -> None:
        """Make and send the rows of those that are served, until each has what it needs."""
        places = self.places
        self.world.each(lambda: [s.read(places, lambda *_: None) for s in self.sources.values()])
        for rank, source in self.sources.items():
            samples = {hook: source.sample(hook).cpu() for hook in places}
            dist.send_object_list([samples], rank, device=torch.device("cpu"))
        batches = {rank: self._batches(rank, source) for rank, source in self.sources.items()}
        # Nobody goes on before all can: a resumed run's first batch comes after all earlier ones.
        ready: dict[int, dict[str, Tensor] | None] = {}
        self.world.each(lambda: ready.update((r, next(b, None)) for r, b in batches.items()))
        while ready:
            for rank, batch in [*ready.items()]:
                if batch is None or _received(rank, 1) == [NO_MORE]:
                    del ready[rank]
                    batches[rank].close()
                    continue
                for _, rows in sorted(batch.items()):
                    dist.send(rows, rank)
                ready[rank] = next(batches[rank], None)
            self.steps_done += 1

    def _batches(self, rank: int, source: StreamSource) -> Generator[dict[str, Tensor]]:
        size, start, stop = _received(rank, 3, self.world.group("world"))
        return source.batches(self.places, size * self.mesh.size, range(start, stop))

    def _load(self) -> Places:
        run = self.run
        lm = load_language_model(run.model, device=self.device, revision=run.revision)
        runs = runs_of(run)
        for rank in range(self.mesh.size):
            if server_of(self.mesh, rank) == self.world.rank:
                source = StreamSource(run, lm, rank, self.mesh.size, ahead=0)
                self.hooks = {name: source.place(one) for name, one in runs.items()}
                self.sources[rank] = source
        return Places(
            {(one.layer, one.hook): self.hooks[name] for name, one in runs.items()},
            {hook: self.source.width(hook) for hook in self.places},
            {hook: self.source.metadata(hook) for hook in self.places},
            lm.model.dtype,
        )


def _wait() -> None:
    """What a process does while those that run the model load it, or make rows again."""


def _received(rank: int, n: int, group: dist.ProcessGroup | None = None) -> list[int]:
    numbers = torch.empty(n, dtype=torch.int64)
    dist.recv(numbers, rank, group)
    return numbers.tolist()
