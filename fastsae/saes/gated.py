"""Gated SAE: which latents fire and how strongly, apart. Rajamanoharan et al. 2024, 2404.16014."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsae.checks import check_counts
from fastsae.saes.base import SAE, SAELoss, warmed_up
from fastsae.saes.config import SAEConfig
from fastsae_kernels import ChunkSums, RaggedCode, row_chunked_loss, threshold_encode


@dataclass(frozen=True, kw_only=True)
class GatedConfig(SAEConfig):
    """With c = x - b_dec, pi = c W_enc + b_gate and mag = c (W_enc exp(r_mag)) + b_mag:

        acts = relu(mag) where pi > 0, else 0
        loss = mse + l1_coefficient mean_b sum_j relu(pi_j) n_j
             + mean_b |relu(pi) W_dec + b_dec - x|^2

    n = |W_dec rows|. As SAELens has it, the decoder learns from the last term too, where the paper
    stops its gradient.
    """

    architecture: ClassVar[str] = "gated"

    l1_coefficient: float = 1.0
    """Weight of the sparsity term, reached at the end of its warm-up."""
    l1_warm_up_steps: int = 0
    """Steps over which the weight rises from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "l1_warm_up_steps", least=0)


class GatedSAE(SAE):
    config_class = GatedConfig
    cfg: GatedConfig
    b_gate: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_parameters(dtype, device)
        del self.b_enc
        for name in ("b_gate", "r_mag", "b_mag"):
            zeros = torch.zeros(len(self.latents), dtype=dtype, device=device)
            setattr(self, name, nn.Parameter(zeros))

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> RaggedCode:
        """The latents whose gate is open; leading axes of x are flattened into B rows.

        mag = exp(r_mag) (pi - b_gate) + b_mag, so that one product gives both.
        """
        rows = self.prepare(x).reshape(-1, self.cfg.d_in)
        code = threshold_encode(rows, self.W_enc, self.b_gate, b_pre=self.b_pre, impl=self.impl)
        latents = code.indices.long()
        mag = self.r_mag.exp()[latents] * (code.acts - self.b_gate[latents]) + self.b_mag[latents]
        return code._replace(acts=mag.relu(), groups=None)

    def pre_acts(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense mag; differentiable."""
        return self._paths(self.prepare(x))[1]

    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense acts, differentiable in mag and not in the gate."""
        return self.acts_of(self.pre_acts(x), x).to(x.dtype)

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        gate, _ = self._paths(self.prepare(x))
        return (gate > 0) * pre_acts.relu()

    def _paths(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """pi and mag of rows."""
        scores = (rows if self.b_pre is None else rows - self.b_pre) @ self.W_enc
        return scores + self.b_gate, scores * self.r_mag.exp() + self.b_mag

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        rows = self._training_rows(x)
        coefficient = self.l1_coefficient(step)
        raw = x.reshape(rows.x.shape)
        weight = raw.new_ones(len(raw)) if rows.weight is None else rows.weight

        def chunk_sums(z: Tensor, target: Tensor, weight: Tensor, raw: Tensor) -> ChunkSums:
            z, raw = z.to(self.dtype), raw.to(self.dtype)
            gate, mag = self._paths(z)
            acts = (gate > 0) * mag.relu()
            err = self._over_latents(acts @ self.W_dec) + self.b_dec - target
            # SAELens's auxiliary path reads rows as they came, normalised at run time or not.
            opened = (gate if rows.weight is None else self._paths(raw)[0]).relu()
            auxiliary = self._over_latents(opened @ self.W_dec) + self.b_dec - raw
            terms = {
                "mse": (err.square().sum(-1) * weight).sum(),
                "l1": coefficient * self._over_latents((opened * self.decoder_norms()).sum()),
                "auxiliary": auxiliary.square().sum(),
            }
            return ChunkSums(terms, err * weight.sqrt().unsqueeze(-1), (acts != 0).sum(0))

        made = row_chunked_loss(
            chunk_sums,
            (rows.x, rows.target, weight, raw),
            [*self.parameters()],
            d_sae=self.widest_shard,
        )
        return SAELoss(made.total, made.terms, x, made.err, made.counts)

    def l1_coefficient(self, step: int) -> float:
        """The weight of the sparsity term at a step: linear from 0 over the warm-up."""
        return warmed_up(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps, step)

    @property
    def encoder_biases(self) -> list[Tensor]:
        return [self.b_gate, self.b_mag]

    def _bias_gains(self) -> list[float | Tensor]:
        return [1.0, self.r_mag.exp()]
