"""What a step says over all parts of its batch: its loss, its figures, whether rows are sound."""

from typing import Any

import torch
from torch import Tensor

from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAELoss
from fastsae.training.dead_latents import DeadLatents


def check_finite(rows: Tensor, step: int, mesh: Mesh) -> None:
    """Raise ValueError, on every process, where any of them holds NaN or inf."""
    bad = (~rows.isfinite()).any(dim=-1)
    n_bad = int(bad.sum())
    if not mesh.any(n_bad > 0):
        return
    where = f"the first at row {int(bad.int().argmax())}" if n_bad else "others on other ranks"
    raise ValueError(
        f"activations must be finite, got NaN or inf in {n_bad} rows of the batch at "
        f"step {step}, {where}"
    )


def figures_of(loss: SAELoss, dead: DeadLatents, mesh: Mesh) -> dict[str, Any]:
    """Of a step, over the whole batch and all latents: terms, FVU, L0, latents that do not fire."""
    rows = (loss.x if loss.target is None else loss.target).to(loss.err.dtype)
    mean = mesh.mean(rows.mean(0), "dp")
    squares = [(rows - mean).square().sum(), loss.err.square().sum()]
    spread, error = mesh.sum(torch.stack(squares), "dp")
    here = torch.stack([dead.dead().sum(), (dead.fired == 0).sum()])
    n_dead, never_fired = mesh.sum(here, "tp").tolist()
    return {
        **{name: float(mesh.mean(value, "dp")) for name, value in loss.terms.items()},
        "fvu": float(error / spread),
        "l0": float(mesh.sum(loss.counts.sum(), "world")) / (len(loss.x) * mesh.dp),
        "dead": n_dead,
        "never_fired": never_fired,
    }


def joined(losses: list[SAELoss]) -> SAELoss:
    """The loss of a batch from those of its parts; the parts' codes are left out."""
    if len(losses) == 1:
        return losses[0]
    rows = sum(len(loss.x) for loss in losses)
    shares = [len(loss.x) / rows for loss in losses]
    mean = lambda values: torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum()
    targets = [loss.target for loss in losses if loss.target is not None]
    return SAELoss(
        total=mean([loss.total.detach() for loss in losses]),
        terms={name: mean([loss.terms[name] for loss in losses]) for name in losses[0].terms},
        x=torch.cat([loss.x for loss in losses]),
        err=torch.cat([loss.err for loss in losses]),
        counts=torch.stack([loss.counts for loss in losses]).sum(0),
        target=torch.cat(targets) if targets else None,
    )
