"""BatchTopK SAE: k latents a row on average. Bussmann et al. 2024, arXiv 2412.06410."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.saes.base import SAELoss
from fastsae.saes.config import SAEConfig
from fastsae.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from fastsae.saes.topk import TopKSAE, refuse_auxk_under_run_time_normalisation
from fastsae_kernels import RaggedCode, batch_topk_encode


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SAEConfig):
    """h = (x - b_dec) W_enc + b_enc; acts = the k B largest of relu(h * n) over the batch.

    n = |W_dec rows|. Used as a JumpReLU SAE whose one threshold is the running mean of the smallest
    act of each training batch.
    """

    architecture: ClassVar[str] = "batchtopk"

    k: float | int = 64
    """Active latents a row, on average."""
    rescale_acts_by_decoder_norm: bool = True
    """Rank latents by h * n, so that the norms of W_dec's rows do not matter; n = 1 otherwise."""
    aux_loss_coefficient: float = 1.0
    """Weight of AuxK, the loss that revives dead latents; 0 turns it off."""
    topk_threshold_lr: float = 0.01
    """Weight of a batch in the running mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k must be in (0, d_sae] with d_sae = {self.d_sae}, got {self.k}")
        if not 0 < self.topk_threshold_lr <= 1:
            raise ValueError(f"topk_threshold_lr must be in (0, 1], got {self.topk_threshold_lr}")

    def check_trainable(self) -> None:
        refuse_auxk_under_run_time_normalisation(self)


class BatchTopKSAE(TopKSAE):
    config_class = BatchTopKConfig
    cfg: BatchTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    topk_threshold: Tensor

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_parameters(dtype, device)
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchTopKSAE":
        precise = self.topk_threshold
        super()._apply(fn, recurse)
        self.topk_threshold = precise.to(self.topk_threshold.device)  # .to(dtype) is for weights
        return self

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> RaggedCode:
        """The k B largest of these rows: what a row's code is depends on the others.

        `inference_form` is the SAE in which it does not.
        """
        rows = self.prepare(x).reshape(-1, self.cfg.d_in)
        return self._encode(rows, self._scale())._replace(groups=None)

    def _encode(self, x: Tensor, scale: Tensor | None) -> RaggedCode:
        return batch_topk_encode(
            x,
            self.W_enc,
            self.b_enc,
            self.cfg.k,
            b_pre=self.b_pre,
            scale=scale,
            W_compute=self.compute_copies.get("W_enc"),
            shards=self.shards,
            impl=self.impl,
        )

    def _kept(self, ranked: Tensor) -> Tensor:
        n_kept = int(self.cfg.k * ranked[..., 0].numel())
        flat = ranked.flatten()
        largest = flat.topk(n_kept).indices
        return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(ranked)

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        found = super().loss(x, dead, step)
        assert isinstance(found.code, RaggedCode)
        self._update_threshold(found.code.acts.detach())
        return found

    @torch.no_grad()
    def _update_threshold(self, acts: Tensor) -> None:
        """threshold += lr (smallest positive act - threshold), nothing where no act is positive."""
        none = acts.new_full((1,), torch.inf)  # a shard may be without an act
        smallest = torch.cat([torch.where(acts > 0, acts, torch.inf), none]).amin()
        smallest = smallest if self.shards is None else self.shards.least(smallest)
        smallest = smallest.to(self.topk_threshold.dtype)
        moved = torch.lerp(self.topk_threshold, smallest, self.cfg.topk_threshold_lr)
        self.topk_threshold.copy_(torch.where(smallest.isinf(), self.topk_threshold, moved))

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        super().fold_activation_scale(scale)
        if self.cfg.rescale_acts_by_decoder_norm:  # acts are h * n, and n is divided by the scale
            self.topk_threshold.div_(scale)

    @torch.no_grad()
    def inference_form(self) -> JumpReLUSAE:
        """The JumpReLU SAE with the running threshold, decoder norms folded in."""
        if self.cfg.rescale_acts_by_decoder_norm:
            self.fold_W_dec_norm()
        shared = {f.name: getattr(self.cfg, f.name) for f in fields(SAEConfig)}
        metadata = {**self.cfg.metadata, "training_architecture": self.cfg.architecture}
        made = JumpReLUSAE(
            replace(JumpReLUConfig(**shared), metadata=metadata),
            device=self.device,
            shards=self.shards,
        )
        weights = {k: v for k, v in self.state_dict().items() if k != "topk_threshold"}
        threshold = self.topk_threshold.to(torch.float32).expand(len(self.latents))
        made.load_state_dict({**weights, "threshold": threshold})
        made.impl = self.impl
        return made
