"""What a dictionary takes before a GPU is rented: memory, traffic and time, by formula.

A step of one process, with B' = B / dp rows, F' = ceil(F / tp) latents and n the world:

    compute    2 B' D F' / flops                                       the encoder's product
             + optimizer bytes a weight * 2 F' D (/ dp by rows) / bandwidth
             + 2 gathers of B' K' D elements / bandwidth, K' = K / tp   decode, and all gradients
    tp         rows [B / n, D] gathered, x_hat [B', D] and l1 reduced, the k best values gathered
    dp         pairs gathered with the rows they refer to, or gradients reduced and rows gathered

`step_bytes` is exact, and a test holds a real run's counters to it. Seconds are `SLACK` times the
sum of the parts, without overlap between them: `SLACK` and `GATHERS` are fitted to the seven steps
of single GPUs in `bench/results/gpu.jsonl`, which are within 11 %.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from fastsae.checks import check_choice, check_counts
from fastsae.distributed.gradients import Exchange
from fastsae.distributed.mesh import Extent
from fastsae.distributed.shards import range_of
from fastsae.saes import TopKConfig
from fastsae.training.config import DataConfig, Moments, OptimizerConfig, TrainConfig
from fastsae.training.memory import MOMENT_BYTES, MemoryPlan, shown
from fastsae.training.split import exchange_of, traffic_of

SLACK = 1.17
"""Of a step over the sum of its parts: the middle of the measured ones, 1.06 to 1.29."""
GATHERS = 2
"""Passes over the pairs as far as memory is concerned: of the four there are, the gradients' find
much of what they read in cache."""
LEFT_FREE = 0.92
"""Of a GPU's memory, that a run may use."""


class GPU(NamedTuple):
    """Rates of one GPU; products and memory as measured where the table of benchmarks has them."""

    memory: float
    """Bytes."""
    flops: float
    """Of bf16 products, a second."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other GPUs of its machine, bytes a second and direction."""
    network: float
    """To other machines, bytes a second."""


PRODUCTS, MEMORY, LINKS = 0.78, 0.9, 0.8
"""Of a data sheet's rates what is reached: products and memory as measured on both GPUs that were,
links by assumption."""
GPUS: Mapping[str, GPU] = {
    "h100": GPU(80e9, 776e12, 3.03e12, LINKS * 450e9, LINKS * 50e9),
    "h200": GPU(141e9, 771e12, 4.28e12, LINKS * 450e9, LINKS * 50e9),
    "a100": GPU(80e9, PRODUCTS * 312e12, MEMORY * 2.04e12, LINKS * 300e9, LINKS * 25e9),
    "b200": GPU(180e9, PRODUCTS * 2250e12, MEMORY * 8.0e12, LINKS * 900e9, LINKS * 50e9),
}
"""H100 and H200: medians of the ceilings in `bench/results/gpu.jsonl`; others from data sheets."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What training a TopK dictionary takes: memory, traffic and time of each mesh of GPUs."""

    d_in: int
    """D, the width of the activations."""
    d_sae: int
    """F, the number of latents."""
    k: int = 64
    """Active latents a row."""
    batch_size: int = 8192
    """Tokens a step."""
    tokens: int = 1_000_000_000
    """Tokens of the whole run."""
    gpus: int = 1
    """GPUs there are."""
    gpu: Literal["a100", "b200", "h100", "h200"] = "h200"
    gpus_per_machine: int = 8
    """GPUs joined by a fast link."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights: bf16 ones are rounded stochastically, and need no copies for the products."""
    moments: Moments = "float32"
    """How Adam's moments are kept."""
    micro_batch_size: int | None = None
    """Tokens of a part of a batch whose gradient is computed at once."""
    dp: int | None = None
    """Parts of the batch; None: the fastest that fits."""
    tp: int | None = None
    """Shards of the dictionary; None: the fastest that fits."""

    def __post_init__(self) -> None:
        counts = ("d_in", "d_sae", "k", "batch_size", "tokens", "gpus", "gpus_per_machine")
        check_counts(self, *counts)
        check_choice(self, "gpu", sorted(GPUS))

    @property
    def optimizer_bytes(self) -> int:
        """Of a weight: it and its moments are read and written, the copy of an fp32 one written."""
        weight = 4 if self.dtype == "float32" else 2
        moment = MOMENT_BYTES[self.moments] or weight
        return 2 * weight + 4 * moment + (2 if weight == 4 else 0)

    def config(self) -> TrainConfig:
        cfg = TrainConfig(
            sae=TopKConfig(d_in=self.d_in, d_sae=self.d_sae, k=self.k, dtype=self.dtype),
            data=DataConfig(
                total_tokens=max(self.tokens, self.batch_size),
                batch_size=self.batch_size,
                micro_batch_size=self.micro_batch_size,
                compute_dtype="bfloat16",
            ),
            optimizer=OptimizerConfig(
                moments=self.moments,
                rounding="stochastic" if self.dtype == "bfloat16" else "nearest",
            ),
        )
        return cfg.resolved(torch.device("cpu"))


class Predicted(NamedTuple):
    """Of one mesh."""

    mesh: Extent
    exchange: Exchange
    memory: dict[str, int]
    """Bytes of the process that holds most, by item."""
    sent: Counter[str]
    """Bytes that a process sends in a step, by collective and axis."""
    seconds: dict[str, float]
    """Of a step, by part."""
    plan: Plan

    @property
    def n_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.n_bytes <= LEFT_FREE * GPUS[self.plan.gpu].memory

    @property
    def step_seconds(self) -> float:
        return SLACK * sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.plan.batch_size / self.step_seconds


def step_bytes(
    cfg: TrainConfig, mesh: Extent, *, row_itemsize: int, n_pairs: int | None = None
) -> Counter[str]:
    """Bytes that each process of a mesh sends in a step of a TopK SAE, without AuxK and logging.

    Keys and numbers are those of `Mesh.sent`: ring algorithms, n the processes along the axis.

    Args:
        cfg: a resolved run.
        row_itemsize: bytes of an element of the rows that are handed in.
        n_pairs: active pairs of the process that has most; None: K / tp a row, rounded up.
    """
    assert isinstance(cfg.sae, TopKConfig) and cfg.data.batch_size is not None
    sent: Counter[str] = Counter()
    dp, tp, d = mesh.dp, mesh.tp, cfg.sae.d_in
    part, latents = cfg.data.batch_size // dp, len(range_of(cfg.sae.d_sae, tp, 0))
    pieces = -(-part // (cfg.data.micro_batch_size or part))

    def gather(axis: str, n: int, n_bytes: int) -> None:
        sent[f"all_gather over {axis}"] += (n - 1) * n_bytes

    def reduce(axis: str, n: int, n_bytes: int) -> None:
        sent[f"all_reduce over {axis}"] += 2 * (n - 1) * n_bytes // n

    if tp > 1:
        gather("tp", tp, part // tp * d * row_itemsize)
        gather("tp", tp, part * min(cfg.sae.k, latents) * 4)
        reduce("tp", tp, part * d * 4)  # x_hat
        reduce("tp", tp, part * 4)  # l1
        if cfg.sae.apply_b_dec_to_input:
            for _ in range(pieces):
                reduce("tp", tp, d * 4)
        reduce("tp", tp, 4)  # whether a latent is dead
        if cfg.optimizer.clip_norm is not None:
            reduce("tp", tp, 4)
    if dp > 1:
        reduce("dp", dp, latents * 8)  # on how many rows each fired
        reduce("dp", dp, 4)  # the loss
        reduce("dp", dp, latents * 4)  # b_enc
        reduce("dp", dp, d * 4)  # b_dec
        pairs = -(-part * cfg.sae.k // tp) if n_pairs is None else n_pairs
        gradients = traffic_of(cfg, mesh, pairs)
        if exchange_of(cfg, mesh) == "rows":
            sent["reduce_scatter over dp"] += gradients.rows // 2
            sent["all_gather over dp"] += gradients.rows // 2
            if cfg.optimizer.clip_norm is not None:
                reduce("dp", dp, 4)
        else:
            sent["all_gather over dp"] += gradients.pairs
            gather("dp", dp, 3 * 8 * pieces)  # lengths
            for _ in range(pieces):
                reduce("dp", dp, latents * 4)
    return sent


def predict(plan: Plan, mesh: Extent) -> Predicted:
    """Memory, traffic and time of one mesh."""
    cfg, gpu = plan.config(), GPUS[plan.gpu]
    memory = MemoryPlan({"": cfg}, torch.device("cuda"), mesh=mesh).items()
    exchange = exchange_of(cfg, mesh)
    sent = step_bytes(cfg, mesh, row_itemsize=2)
    part, latents = plan.batch_size / mesh.dp, -(-plan.d_sae // mesh.tp)
    owned = latents / mesh.dp if exchange == "rows" and mesh.dp > 1 else latents
    weights = 2 * owned * plan.d_in
    # Pairs that were gathered are summed for the whole batch by everybody.
    summed = plan.batch_size if exchange == "pairs" else part
    gathered = GATHERS / 2 * (part + summed) * plan.k / mesh.tp * plan.d_in * 2
    inside = {"tp": mesh.tp, "dp": mesh.size}
    seconds = {
        "encoder's product": 2 * part * plan.d_in * latents / gpu.flops,
        "optimizer": plan.optimizer_bytes * weights / gpu.bandwidth,
        "gathers": gathered / gpu.bandwidth,
    }
    for axis, reach in inside.items():
        rate = gpu.link if reach <= plan.gpus_per_machine else gpu.network
        n_bytes = sum(n for name, n in sent.items() if name.endswith(f"over {axis}"))
        if n_bytes:
            seconds[f"traffic over {axis}"] = n_bytes / rate
    return Predicted(mesh, exchange, memory, sent, seconds, plan)


def meshes(plan: Plan, n: int) -> Iterator[Extent]:
    """Ways to lay out n GPUs that the plan allows."""
    for tp in range(1, n + 1):
        dp = n // tp
        possible = dp * tp == n and plan.batch_size % n == 0 and range_of(plan.d_sae, tp, tp - 1)
        if possible and plan.dp in (None, dp) and plan.tp in (None, tp):
            yield Extent(dp, tp)


def fastest(plan: Plan, n: int) -> Predicted | None:
    """The fastest layout of n GPUs that fits; None: none does."""
    found = [predict(plan, mesh) for mesh in meshes(plan, n)]
    return min((p for p in found if p.fits), key=lambda p: p.step_seconds, default=None)


def smallest(plan: Plan) -> Predicted | None:
    """The fewest GPUs, up to those there are, on which the run fits, laid out the fastest way."""
    layouts = (fastest(plan, n) for n in range(1, plan.gpus + 1))
    return next((found for found in layouts if found is not None), None)


def described(found: Predicted) -> str:
    """Tables of memory, traffic and time."""
    plan, mesh = found.plan, found.mesh
    gpu = GPUS[plan.gpu]
    lines = [
        f"dp {mesh.dp} x tp {mesh.tp} on {mesh.size} {plan.gpu}"
        + (f", exchange of {found.exchange} over dp" if mesh.dp > 1 else ""),
        "",
        "memory of a GPU",
        *(f"  {name:28}{shown(n):>12}" for name, n in found.memory.items() if n),
        f"  {'in all':28}{shown(found.n_bytes):>12} of {shown(int(gpu.memory))}",
        "",
        "time of a step",
        *(f"  {name:28}{1e3 * s:>9.2f} ms" for name, s in found.seconds.items()),
        f"  {f'in all, times {SLACK}':28}{1e3 * found.step_seconds:>9.2f} ms",
    ]
    if found.sent:
        lines += ["", "a GPU sends in a step"]
        lines += [f"  {name:28}{shown(n):>12}" for name, n in sorted(found.sent.items())]
    hours = plan.tokens / found.tokens_per_second / 3600
    lines += [
        "",
        f"{found.tokens_per_second:,.0f} tokens a second; {plan.tokens:,} tokens take "
        f"{hours:,.1f} hours, {hours * mesh.size:,.0f} GPU hours",
    ]
    return "\n".join(lines)


def plan_report(plan: Plan) -> str:
    """The plan on all GPUs there are, and on as few as will do.

    Raises:
        ValueError: no layout is possible, or none fits.
    """
    if not any(True for _ in meshes(plan, plan.gpus)):
        raise ValueError(
            f"gpus must be dp * tp and divide batch_size {plan.batch_size}, got {plan.gpus} with "
            f"dp {plan.dp} and tp {plan.tp}"
        )
    few = smallest(replace(plan, dp=None, tp=None))
    best = fastest(plan, plan.gpus)
    if best is None:
        least = min(predict(plan, mesh).n_bytes for mesh in meshes(plan, plan.gpus))
        usable = shown(int(LEFT_FREE * GPUS[plan.gpu].memory))
        elsewhere = f"; {few.mesh.size} are enough as {few.mesh.dp} x {few.mesh.tp}" if few else ""
        raise ValueError(
            f"gpus must hold the run, got {plan.gpus} {plan.gpu} that need {shown(least)} each, of "
            f"{usable} that may be used{elsewhere}; moments '8bit', dtype 'bfloat16', a smaller "
            "micro_batch_size or more GPUs help"
        )
    text = described(best)
    if few is not None and few.mesh.size < plan.gpus:
        text += (
            f"\n\nas few as fit: {few.mesh.size} {plan.gpu}, dp {few.mesh.dp} x tp {few.mesh.tp}, "
            f"{few.tokens_per_second:,.0f} tokens a second"
        )
    command = f"torchrun --nproc-per-node {min(best.mesh.size, plan.gpus_per_machine)}"
    if best.mesh.size > plan.gpus_per_machine:
        command += f" --nnodes {-(-best.mesh.size // plan.gpus_per_machine)}"
    if best.mesh.size > 1:
        text += f"\n\n{command} -m fastsae train --dp {best.mesh.dp} --tp {best.mesh.tp} ..."
    return text
