"""What a run needs of one device's memory, item by item, before it starts and when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fastsae.distributed.mesh import Extent
from fastsae.distributed.shards import LatentShards, range_of
from fastsae.saes import SAES
from fastsae.training.config import TrainConfig
from fastsae.training.optimizer import DICTIONARY
from fastsae.training.split import exchange_of
from fastsae_kernels import DEFAULT_WORKSPACE

BYTES_A_PAIR = 40
"""Acts, indices, the gradient of the acts, and the pairs sorted by latent with their sort keys."""
MOMENT_BYTES = {"float32": None, "bfloat16": 2, "8bit": 1}
"""Of an element; None: those of the weight."""


class Saving(NamedTuple):
    setting: str
    n_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one run or of several side by side, by item.

    The sizes of weights, moments, copies and gradients are exact; those of a step are an estimate.
    """

    cfgs: Mapping[str, TrainConfig]
    """Resolved, by name."""
    device: torch.device
    held: Mapping[str, int] = field(default_factory=dict)
    """Bytes that stay for the whole run besides: activations, a language model."""
    halved: Mapping[str, str] = field(default_factory=dict)
    """For an item of `held`, the setting that halves it."""
    mesh: Extent = Extent()
    """The processes that share a run; the bytes are those of one that has most."""

    def items(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for cfg in self.cfgs.values():
            for name, n_bytes in _kept(cfg, self.mesh).items():
                total[name] = total.get(name, 0) + n_bytes
        steps = [_step(cfg, self.device, self.mesh) for cfg in self.cfgs.values()]
        return {**self.held, **total, "one step": max(steps)}

    @property
    def n_bytes(self) -> int:
        return sum(self.items().values())

    def savings(self) -> list[Saving]:
        """The three settings that free most."""
        found = [Saving(s, self.held[item] // 2) for item, s in self.halved.items()]
        for setting, change in CHANGES.items():
            cfgs = {name: change(cfg) for name, cfg in self.cfgs.items()}
            saved = self.n_bytes - replace(self, cfgs=cfgs).n_bytes
            found.append(Saving(setting, saved))
        found.sort(key=lambda saving: -saving.n_bytes)
        return [saving for saving in found if saving.n_bytes > 0][:3]

    def table(self) -> str:
        """A line an item, the sum, and what the device has free where that is known."""
        items = {name: n for name, n in self.items().items() if n}
        lines = [f"  {name:24}{shown(n):>10}" for name, n in items.items()]
        free = free_bytes(self.device)
        of_free = "" if free is None else f" of {shown(free)} free"
        lines.append(f"  {'in all':24}{shown(self.n_bytes):>10}{of_free}")
        return "\n".join([f"memory on {self.device}, predicted:", *lines])

    def advice(self) -> str:
        lines = [f"  {saving.setting}: {shown(saving.n_bytes)} less" for saving in self.savings()]
        return "\n".join(["what frees most:", *lines])

    @property
    def fits(self) -> bool:
        free = free_bytes(self.device)
        return free is None or self.n_bytes <= free


class OutOfMemory(MemoryError):
    """The device's memory is used up; the message has the breakdown and the ways out."""


@contextmanager
def explained(plan: MemoryPlan) -> Iterator[None]:
    """Inside this context running out of memory raises `OutOfMemory`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise OutOfMemory(f"{first}\n{plan.table()}\n{plan.advice()}") from error


def _is_out_of_memory(error: Exception) -> bool:
    on_cpu = "DefaultCPUAllocator" in str(error) and "allocate" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or on_cpu


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _kept(cfg: TrainConfig, mesh: Extent) -> dict[str, int]:
    """Bytes of what stays from step to step, and of the gradients."""
    first = Extent(mesh.dp, mesh.tp)  # its shard is the widest
    shards = LatentShards(first, cfg.sae.d_sae) if mesh.size > 1 else None
    sae = SAES[cfg.sae.architecture](cfg.sae, device="meta", shards=shards)
    splits_rows = exchange_of(cfg, mesh) == "rows" and mesh.dp > 1
    optimizer = cfg.optimizer
    weights = moments = gradients = copies = 0
    compute = getattr(torch, cfg.data.compute_dtype or cfg.sae.dtype)
    for name, p in sae.named_parameters():
        in_dictionary = name in DICTIONARY
        weights += p.nbytes
        narrow = MOMENT_BYTES[optimizer.moments] if in_dictionary else None
        one_moment = optimizer.kind == "signum" or (optimizer.kind == "muon" and p.ndim == 2)
        n = p.numel()
        if in_dictionary and splits_rows:
            n_latents = len(sae.latents)
            n = n // n_latents * len(range_of(n_latents, mesh.dp, 0))
        moments += (1 if one_moment else 2) * n * (narrow or p.itemsize)
        if not (in_dictionary and optimizer.kind == "row_adam"):
            gradients += p.nbytes
        if in_dictionary and compute.itemsize < p.itemsize:
            copies += p.numel() * compute.itemsize
    return {
        "weights": weights,
        "moments": moments,
        "gradients": gradients,
        "copies for the products": copies,
        "counters": 2 * 8 * len(sae.latents),
    }


def _step(cfg: TrainConfig, device: torch.device, mesh: Extent) -> int:
    """Rows and errors of a batch, the pairs of a part of it, and the workspace."""
    batch = (cfg.data.batch_size or 0) // mesh.dp
    part = min(cfg.data.micro_batch_size or batch, batch)
    width = max(cfg.sae.d_in, cfg.sae.d_out)
    pairs = part * int(getattr(cfg.sae, "k", 0)) * BYTES_A_PAIR
    dense = 4 * part * len(range_of(cfg.sae.d_sae, mesh.tp, 0))
    temporary = dense // 20 if device.type == "cuda" else min(DEFAULT_WORKSPACE, dense)
    whole = 0 if part == batch else 2 * 4 * batch * width  # rows and errors of the parts, joined
    return 4 * 4 * part * width + pairs + temporary + whole


def _in_parts(cfg: TrainConfig) -> TrainConfig:
    batch = cfg.data.batch_size or 1
    part = min(cfg.data.micro_batch_size or batch, batch)
    return replace(cfg, data=replace(cfg.data, micro_batch_size=max(1, part // 2)))


def _with_moments(cfg: TrainConfig) -> TrainConfig:
    if cfg.optimizer.kind != "row_adam":
        return cfg
    return replace(cfg, optimizer=replace(cfg.optimizer, moments="8bit"))


def _narrower(cfg: TrainConfig) -> TrainConfig:
    k = getattr(cfg.sae, "k", 1)
    if cfg.sae.d_sae // 2 < k or hasattr(cfg.sae, "matryoshka_widths"):
        return cfg
    return replace(cfg, sae=replace(cfg.sae, d_sae=cfg.sae.d_sae // 2))


def _bf16_masters(cfg: TrainConfig) -> TrainConfig:
    if cfg.optimizer.kind != "row_adam":
        return cfg
    optimizer = replace(cfg.optimizer, rounding="stochastic")
    return replace(cfg, sae=replace(cfg.sae, dtype="bfloat16"), optimizer=optimizer)


CHANGES: Mapping[str, Callable[[TrainConfig], TrainConfig]] = {
    "micro_batch_size halved": _in_parts,
    "moments='8bit'": _with_moments,
    "d_sae halved": _narrower,
    "dtype='bfloat16' with rounding='stochastic'": _bf16_masters,
}
"""Settings that free memory, and what each makes of a run."""


def shown(n_bytes: int) -> str:
    """In the unit that fits."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
