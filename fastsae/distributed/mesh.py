"""The processes of a run: dp parts of the batch times tp shards of the dictionary.

A process has two neighbourhoods: along `tp` are those that hold other latents and the same rows,
along `dp` those that hold other rows and the same latents. Rank r is part r // tp and shard r % tp,
so that shards, which talk most, are neighbours inside a machine.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage]

Axis = Literal["dp", "tp", "world"]
T = TypeVar("T")

# Named so since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

PATIENCE = timedelta(days=7)
"""Of processes that wait for as long as it takes."""
TIMEOUT_SECONDS = 600.0
"""After which a process that does not answer ends the run."""


class Extent(NamedTuple):
    """How many processes a mesh has, without any: what can be planned."""

    dp: int = 1
    tp: int = 1
    part: int = 0
    shard: int = 0

    @property
    def size(self) -> int:
        return self.dp * self.tp


class Mesh:
    """dp x tp processes, each of which makes the same calls in the same order.

    Collectives are not differentiable and leave what they are given alone, but for `broadcast`.
    One process is a mesh too, whose collectives return what they are given; it may be one of
    several that have nothing to do with each other.

    Args:
        dp: parts of the batch.
        tp: shards of the dictionary.
        device: of the process's tensors; decides the backend (NCCL on GPUs, gloo elsewhere).
        beside: further processes, of the highest ranks, that make the mesh and are not in it.
        timeout: after which one that does not answer ends the run; None: PyTorch's own.

    Raises:
        ValueError: dp x tp + beside is not the number of processes.
    """

    def __init__(
        self,
        dp: int = 1,
        tp: int = 1,
        device: torch.device | str = "cpu",
        beside: int = 0,
        timeout: timedelta | None = None,
    ) -> None:
        for name, n in (("dp", dp), ("tp", tp)):
            if n < 1:
                raise ValueError(f"{name} must be at least 1, got {n}")
        world = dist.get_world_size() if dist.is_initialized() else 1
        wanted = dp * tp + beside
        if wanted not in (1, world):
            also = f" and {beside} beside" if beside else ""
            raise ValueError(
                f"dp * tp must be the number of processes, got {dp} * {tp}{also}, and {world} "
                f"processes; start them with: torchrun --nproc-per-node {wanted}"
            )
        self.dp, self.tp, self.beside, self.device = dp, tp, beside, torch.device(device)
        self.rank = dist.get_rank() if wanted > 1 else 0
        self.part, self.shard = divmod(self.rank, tp)
        self.devices: DeviceMesh | None = None
        self.by_latent: DeviceMesh | None = None
        """The same processes with the shards outside: rows are split by `tp`, and then by `dp`."""
        self._all: dist.ProcessGroup | None = None
        if self.size > 1:
            ranks, kind = torch.arange(self.size).view(dp, tp), self.device.type
            self.devices = DeviceMesh(kind, ranks, mesh_dim_names=("dp", "tp"))
            self.by_latent = DeviceMesh(kind, ranks.t(), mesh_dim_names=("tp", "dp"))
            if beside:
                self._all = dist.new_group(ranks.flatten().tolist(), timeout)  # pyright: ignore[reportAttributeAccessIssue]
            if timeout is not None and self.has_this_process:
                for name in ("dp", "tp"):  # a DeviceMesh does not take it
                    _set_pg_timeout(timeout, self.devices.get_group(name))
        self.sent: Counter[str] = Counter()
        """Bytes this process has sent, by kind of collective and axis, as ring algorithms do it."""
        self.calls = 0
        """Collectives this process has begun: who waits for others has begun more."""

    def patient(self) -> "Mesh":
        """The same processes on the host; they wait for each other for days, and a death ends that.

        For what takes as long as a model or a checkpoint is large.
        """
        other = copy.copy(self)
        other.device = torch.device("cpu")
        other._all = dist.new_group(backend="gloo", timeout=PATIENCE)  # pyright: ignore[reportAttributeAccessIssue]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        return self  # its processes exist once

    @property
    def size(self) -> int:
        return self.dp * self.tp

    @property
    def shape(self) -> Extent:
        return Extent(self.dp, self.tp, self.part, self.shard)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def has_this_process(self) -> bool:
        return self.rank < self.size

    def extent(self, axis: Axis) -> int:
        return {"dp": self.dp, "tp": self.tp, "world": self.size}[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Of the processes along an axis; None: all there are."""
        if axis == "world" or self.devices is None:
            return self._all
        return self.devices.get_group(axis)

    def sum(self, t: Tensor, axis: Axis) -> Tensor:
        return self._reduced(t, axis, dist.ReduceOp.SUM)

    def mean(self, t: Tensor, axis: Axis) -> Tensor:
        return self.sum(t, axis) / self.extent(axis)

    def least(self, t: Tensor, axis: Axis) -> Tensor:
        return self._reduced(t, axis, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Whether it holds for any process; the host waits for the others."""
        if self.size == 1:
            return flag
        found = torch.tensor(flag, dtype=torch.int32, device=self.device)
        return bool(self._reduced(found, "world", dist.ReduceOp.MAX))

    @torch.no_grad()
    def gather(self, t: Tensor, axis: Axis) -> Tensor:
        """[n, *t.shape]: everyone's tensor, all of one shape, in the order of the axis."""
        n = self.extent(axis)
        if n == 1:
            return t.unsqueeze(0)
        out = t.new_empty(n * len(t), *t.shape[1:]) if t.ndim else t.new_empty(n)
        self._count("all_gather", axis, (n - 1) * t.nbytes)
        _all_gather(out, t.contiguous().reshape(-1, *t.shape[1:]), self.group(axis))
        return out.view(n, *t.shape)

    @torch.no_grad()
    def gather_ragged(self, t: Tensor, axis: Axis) -> list[Tensor]:
        """Everyone's tensor, whose first axes may differ in length; the host waits."""
        if self.extent(axis) == 1:
            return [t]
        lengths = self.gather(torch.tensor([len(t)], device=self.device), axis).flatten().tolist()
        padded = t.new_zeros(max(lengths), *t.shape[1:])
        padded[: len(t)] = t
        everyone = self.gather(padded, axis)
        return [part[:n] for part, n in zip(everyone, lengths, strict=True)]

    @torch.no_grad()
    def scatter_sum(self, t: Tensor, axis: Axis) -> Tensor:
        """This process's block of the sum over everyone's t, which holds n blocks of equal size."""
        n = self.extent(axis)
        if n == 1:
            return t
        out = t.new_empty(len(t) // n, *t.shape[1:])
        self._count("reduce_scatter", axis, (n - 1) * out.nbytes)
        _reduce_scatter(out, t.contiguous(), group=self.group(axis))
        return out

    @torch.no_grad()
    def broadcast(self, t: Tensor) -> None:
        """Everyone's t becomes that of rank 0."""
        if self.size > 1:
            dense = t.contiguous()
            self._count("broadcast", "world", t.nbytes)
            dist.broadcast(dense, 0, self._all)
            t.copy_(dense)

    def on_first(self, work: Callable[[], T]) -> T:
        """Do it on rank 0 only; everyone gets the result, or the exception."""
        if self.size == 1:
            return work()
        told: list[Any] = [_outcome(work) if self.is_first else None]
        dist.broadcast_object_list(told, 0, self._all, device=self.device)
        return _results(told)[0]

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Everyone does its own; all get what each one's returned, or the first exception."""
        if self.size == 1:
            return [work()]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, _outcome(work), self._all)
        return _results(everyone)

    def check_agreement(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every process if any of these differs between them."""
        everyone = self.each(lambda: facts)
        for name, wanted in everyone[0].items():
            for rank, other in enumerate(everyone):
                if other.get(name) != wanted:
                    raise ValueError(
                        f"{name} must be the same on every process, got {wanted!r} on rank 0 and "
                        f"{other.get(name)!r} on rank {rank}"
                    )

    @torch.no_grad()
    def _reduced(self, t: Tensor, axis: Axis, op: Any) -> Tensor:
        n = self.extent(axis)
        if n == 1:
            return t
        out = t.clone(memory_format=torch.contiguous_format)
        self._count("all_reduce", axis, 2 * (n - 1) * t.nbytes // n)
        dist.all_reduce(out, op, self.group(axis))
        return out

    def _count(self, kind: str, axis: Axis, n_bytes: int) -> None:
        self.sent[f"{kind} over {axis}"] += n_bytes
        self.calls += 1


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returns, or what it raises, to be told to others."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _results(outcomes: list[tuple[Any, Exception | None]]) -> list[Any]:
    """What was returned, or the first exception raised again."""
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def is_one_of_several() -> bool:
    """Whether `join_processes` found others."""
    return dist.is_initialized()


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave_processes() -> None:
    """End what `join_processes` began, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_store(timeout: timedelta) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """A connection to the store of torchrun's processes, for those of this attempt.

    torchrun keeps the store when it starts processes again: what the ones before wrote there,
    addresses that nobody answers at, must not be found.
    """
    kept = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(attempt, kept)  # pyright: ignore[reportPrivateImportUsage]


def join_processes(
    device: torch.device | str = "cpu", timeout_seconds: float = TIMEOUT_SECONDS
) -> int:
    """Join the processes that torchrun started; how many there are.

    Raises:
        RuntimeError: the others do not come within the time-out.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 1
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside NCCL: checkpoints are written from the CPU while the GPU goes on.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank = run_store(timeout), int(os.environ["RANK"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return world
