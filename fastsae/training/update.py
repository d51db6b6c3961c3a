"""One update of an SAE: loss, backward, clipping, optimizer, counters."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.device import resolve_device
from fastsae.distributed.gradients import Parts
from fastsae.distributed.mesh import Mesh
from fastsae.distributed.shards import LatentShards
from fastsae.saes import SAE, SAES, SAELoss
from fastsae.saes.transcoder import Transcodes
from fastsae.training.config import TrainConfig
from fastsae.training.dead_latents import DeadLatents
from fastsae.training.figures import joined
from fastsae.training.optimizer import build_optimizer, compute_copies
from fastsae.training.resampling import resample
from fastsae.training.scaling import build_scaling
from fastsae.training.split import check_agreement, check_split, exchange_of


class Update:
    """An SAE and all that a step of its training changes.

    Args:
        cfg, device, mesh: as in `Trainer`.

    Raises:
        ValueError: the processes' configurations or versions differ, or the run cannot be split.
    """

    def __init__(self, cfg: TrainConfig, device: torch.device | str, mesh: Mesh | None) -> None:
        self.device = resolve_device(device)
        self.cfg = cfg = cfg.resolved(self.device)
        self.mesh = mesh = mesh or Mesh(device=self.device)
        check_agreement(cfg, mesh)
        check_split(cfg, mesh.shape)
        torch.manual_seed(cfg.seed)
        shards = LatentShards(mesh, cfg.sae.d_sae) if mesh.size > 1 else None
        self.sae: SAE = SAES[cfg.sae.architecture](cfg.sae, device=self.device, shards=shards)
        self.lr = cfg.optimizer.lr or 0.0
        whole = [p for n, p in self.sae.named_parameters() if n in self.sae.WITHOUT_LATENT_AXIS]
        self.parts = Parts(mesh, exchange_of(cfg, mesh.shape), whole)
        self.optimizer = build_optimizer(self.sae, cfg.optimizer, self.lr, self.parts)
        self.dead = DeadLatents(
            len(self.sae.latents),
            cfg.dead_window or 0,
            self.device,
            anywhere=lambda here: mesh.sum(here.int(), "tp") > 0,
        )
        self.compute_dtype: torch.dtype = getattr(torch, cfg.data.compute_dtype or cfg.sae.dtype)
        self.copy_weights()
        self.steps_done = 0
        self.scaling = build_scaling(cfg.sae.normalize_activations)
        self._total = torch.zeros(())

    def copy_weights(self) -> None:
        """Make the copies that the products read; from here on the optimizer keeps them."""
        copies = compute_copies(self.sae, self.compute_dtype)
        self.sae.compute_copies = copies
        self.optimizer.copies = {getattr(self.sae, name): copy for name, copy in copies.items()}

    def step(
        self, x: Float[Tensor, "B D"], target: Float[Tensor, "B D_out"] | None = None
    ) -> SAELoss:
        """One update of the SAE on unscaled rows; `target` is what a transcoder predicts.

        Rows in pinned memory are still being copied to the GPU when this returns: do not write to
        them again.

        Raises:
            ValueError: a transcoder without a target, or another SAE with one.
        """
        if isinstance(self.sae, Transcodes) != (target is not None):
            given = "None" if target is None else f"a tensor {list(target.shape)}"
            raise ValueError(
                "target must be given for transcoders and for nothing else, got "
                f"{given} for the architecture {self.cfg.sae.architecture!r}"
            )
        factor = self.cfg.schedule.factor(self.steps_done, self.cfg.total_steps, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.zero_grad()
        x = self._same_rows(x)
        loss = self._gradient(x, None if target is None else self._same_rows(target))
        counts = self.mesh.sum(loss.counts.long(), "dp")
        self.dead.update(counts, len(x) * self.mesh.dp)
        self.optimizer.combine()
        clip_norm = self.cfg.optimizer.clip_norm
        if clip_norm is not None:
            norm = self.optimizer.gradient_norm()
            self.optimizer.scale_gradient((clip_norm / (norm + 1e-6)).clamp_max(1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        self._total = self.mesh.mean(loss.total.detach(), "dp")
        self._resample(loss)
        return loss

    def _same_rows(self, rows: Tensor) -> Tensor:
        """The rows of this part of the batch, of which each shard was given some."""
        if self.mesh.tp == 1:
            return rows
        return self.mesh.gather(self._here(rows, rows.dtype), "tp").flatten(0, 1)

    def _here(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows on the device."""
        if self.device.type == "cuda":  # as they are: half the bytes, and nobody waits for the copy
            rows = rows.to(self.device, non_blocking=True)
        return rows.to(self.device, dtype)

    def _resample(self, loss: SAELoss) -> None:
        every = self.cfg.resample_every
        # Later ones would have too little of the run left to learn.
        due = every and self.steps_done % every == 0
        if due and self.steps_done <= self.cfg.total_steps // 2:
            seed = self.cfg.seed * 1_000_003 + self.steps_done
            revived = resample(self.sae, self.optimizer, loss, self.dead.dead(), seed)
            self.dead.start_again(revived)

    def _gradient(self, x: Tensor, target: Tensor | None) -> SAELoss:
        """The batch's loss, its gradient left with the optimizer; a micro-batch at a time."""
        dead = self.dead.dead() if self.dead.any() else None
        dtype = self.sae.dtype
        width = self.cfg.data.micro_batch_size or len(x)
        targets = [None] * -(-len(x) // width) if target is None else target.split(width)
        losses = []
        for rows, wanted in zip(x.split(width), targets, strict=True):
            options: dict[str, Tensor] = {}
            if wanted is not None:
                options["target"] = self.scaling.apply_to_targets(self._here(wanted, dtype))
            rows = self.scaling.apply(self._here(rows, dtype)).to(self.compute_dtype)
            loss = self.sae.loss(rows, dead, self.steps_done, **options)
            (loss.total if len(rows) == len(x) else loss.total * (len(rows) / len(x))).backward()
            losses.append(loss)
        return joined(losses)

    def check_loss(self) -> None:
        """Raise ValueError if the last step's loss was NaN or inf."""
        total = float(self._total)
        if not math.isfinite(total):
            raise ValueError(
                f"loss must be finite, got {total} at step {self.steps_done}; "
                "lower lr, or check the activations"
            )
