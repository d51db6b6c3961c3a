"""How a run is split over the processes of a mesh."""

from dataclasses import asdict
from importlib.metadata import version

import torch

from fastsae.distributed.gradients import Exchange, Traffic, traffic
from fastsae.distributed.mesh import Extent, Mesh
from fastsae.saes import SAES
from fastsae.training.config import TrainConfig

AGREE_ON = ("torch", "fastsae-triton")
"""Packages of which all processes have the same version."""


def check_agreement(cfg: TrainConfig, mesh: Mesh) -> None:
    """Raise ValueError, on every process, where their resolved runs or packages differ."""
    versions = {f"version of {name}": version(name) for name in AGREE_ON}
    mesh.check_agreement({**versions, **asdict(cfg), "architecture": cfg.sae.architecture})


def check_split(cfg: TrainConfig, mesh: Extent) -> None:
    """Raise ValueError where a resolved run cannot be split over a mesh."""
    if mesh.size == 1:
        return
    assert cfg.data.batch_size is not None
    if cfg.data.batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes {mesh.size}, "
            f"got {cfg.data.batch_size}"
        )
    if cfg.resample_every is not None:
        raise ValueError(
            f"resample_every must be None with several processes, got {cfg.resample_every}: AuxK "
            "revives dead latents"
        )
    if mesh.tp == 1:
        return
    if not SAES[cfg.sae.architecture].splits_by_latent:
        able = sorted(name for name, sae in SAES.items() if sae.splits_by_latent)
        raise ValueError(
            f"tp must be 1 for the architecture {cfg.sae.architecture!r}, got {mesh.tp}; latents "
            f"are split for {able}"
        )
    if cfg.optimizer.kind == "muon":
        raise ValueError(f"tp must be 1 for kind 'muon', which needs whole matrices, got {mesh.tp}")


def exchange_of(cfg: TrainConfig, mesh: Extent) -> Exchange:
    """What travels between the parts of a batch: what was asked for, or the fewer bytes."""
    if cfg.exchange != "auto":
        return cfg.exchange
    if mesh.dp == 1 or cfg.optimizer.kind != "row_adam":
        return "pairs"
    k = getattr(cfg.sae, "k", None)
    if k is None:  # a code of thresholds may be nearly dense at first
        return "rows"
    return traffic_of(cfg, mesh, int((cfg.data.batch_size or 0) // mesh.dp * k / mesh.tp)).cheaper


def traffic_of(cfg: TrainConfig, mesh: Extent, n_pairs: int) -> Traffic:
    """Between the parts of a run's batches, with so many active pairs on a shard of a part."""
    return traffic(
        mesh,
        rows=(cfg.data.batch_size or 0) // mesh.dp,
        d_in=cfg.sae.d_in,
        d_out=cfg.sae.d_out,
        d_sae=cfg.sae.d_sae,
        n_pairs=n_pairs,
        itemsize=getattr(torch, cfg.data.compute_dtype or cfg.sae.dtype).itemsize,
    )
