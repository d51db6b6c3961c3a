"""Standard SAE: ReLU and an L1 penalty weighted by decoder norms. Conerly et al. 2024."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.checks import check_counts
from fastsae.saes.base import SAE, SAELoss, TrainingRows, warmed_up
from fastsae.saes.config import SAEConfig
from fastsae.saes.density import is_sparse
from fastsae_kernels import (
    ChunkSums,
    RaggedCode,
    group_by_latent,
    relu_l1_loss,
    row_chunked_loss,
    row_norms,
    threshold_encode,
)


@dataclass(frozen=True, kw_only=True)
class StandardConfig(SAEConfig):
    """acts = relu((x - b_dec) W_enc + b_enc); loss = mse + l1_coefficient * l1."""

    architecture: ClassVar[str] = "standard"

    l1_coefficient: float = 1.0
    """Weight of the sparsity term, reached at the end of its warm-up."""
    l1_warm_up_steps: int = 0
    """Steps over which the weight rises from 0."""
    lp_norm: float = 1.0
    """p of the norm over the latents."""
    use_ghost_grads: bool = False
    """Whether dead latents learn to predict the residual, as SAELens's did before version 6. With
    e = x_hat - x of a row, g = exp(h_dead) W_dec[dead] and g' = g |e| / (2 |g| + 1e-6), the loss
    gains the mean over all entries of

        (g' + e)^2 * e^2 / ((g' + e)^2 + 1e-6)

    in which only g and the first square carry gradient, the ratio of norms as a constant. Jermyn
    and Templeton 2024 (Ghost Grads, Anthropic's January update)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "l1_warm_up_steps", least=0)
        if not self.lp_norm > 0:
            raise ValueError(f"lp_norm must be above 0, got {self.lp_norm}")


class StandardSAE(SAE):
    config_class = StandardConfig
    cfg: StandardConfig

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> RaggedCode:
        """The positive latents; leading axes of x are flattened into B rows."""
        rows = self.prepare(x).reshape(-1, self.cfg.d_in)
        return threshold_encode(rows, self.W_enc, self.b_enc, b_pre=self.b_pre, impl=self.impl)

    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense acts, differentiable."""
        return self.acts_of(self.pre_acts(x), x).to(x.dtype)

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        return pre_acts.relu()

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """decode(encode(x)); through dense acts where a gradient is wanted."""
        if torch.is_grad_enabled():
            return self.decode(self.encode(x)).reshape(x.shape).to(x.dtype)
        return super().forward(x)

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        return self._loss(x, self._training_rows(x), dead, step)

    def _loss(self, x: Tensor, rows: TrainingRows, dead: Tensor | None, step: int) -> SAELoss:
        coefficient = self.l1_coefficient(step)
        ghosts = (
            dead.nonzero().squeeze(1) if self.cfg.use_ghost_grads and dead is not None else None
        )
        if ghosts is not None and (len(ghosts) or self.shards is not None):
            return self._dense_loss(x, rows, coefficient, ghosts)
        if self.cfg.lp_norm == 1 and is_sparse(self, rows.x):
            return self._sparse_loss(x, rows, coefficient)
        if rows.target is rows.x and rows.weight is None and self.shards is None:
            return self._relu_l1_loss(x, coefficient)
        return self._dense_loss(x, rows, coefficient)

    def _sparse_loss(self, x: Tensor, rows: TrainingRows, coefficient: float) -> SAELoss:
        code = threshold_encode(
            rows.x,
            self.W_enc,
            self.b_enc,
            b_pre=self.b_pre,
            W_compute=self.compute_copies.get("W_enc"),
            impl=self.impl,
        )
        mse, l1, err = self._reconstruction(rows, code, row_norms(self.W_dec))
        l1 = coefficient * l1
        groups = code.groups or group_by_latent(code, len(self.latents), impl=self.impl)
        terms = {"mse": mse.detach(), "l1": l1.detach()}
        return SAELoss(mse + l1, terms, x, err, groups.counts(), code)

    def _relu_l1_loss(self, x: Tensor, coefficient: float) -> SAELoss:
        result = relu_l1_loss(
            self._normalise(x),
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            l1_coefficient=coefficient,
            lp_norm=self.cfg.lp_norm,
            b_pre=self.b_pre,
            impl=self.impl,
        )
        terms = {"mse": result.mse, "l1": coefficient * result.l1}
        return SAELoss(result.total, terms, x, result.err, result.counts)

    def _dense_loss(
        self, x: Tensor, rows: TrainingRows, coefficient: float, ghosts: Tensor | None = None
    ) -> SAELoss:
        weight = x.new_ones(len(rows.x)) if rows.weight is None else rows.weight

        def chunk_sums(z: Tensor, target: Tensor, weight: Tensor) -> ChunkSums:
            z = z.to(self.dtype)
            h = (z if self.b_pre is None else z - self.b_pre) @ self.W_enc + self.b_enc
            acts = h.relu()
            err = self._over_latents(acts @ self.W_dec) + self.b_dec - target
            l1 = self._p_norm(acts * self.decoder_norms())
            terms = {"mse": (err.square().sum(-1) * weight).sum(), "l1": coefficient * l1.sum()}
            err = err * weight.sqrt().unsqueeze(-1)
            if ghosts is not None:
                ghost = self._over_latents(h[:, ghosts].exp() @ self.W_dec[ghosts])
                terms["ghost"] = self.ghost_coefficient * ghost_loss(ghost, err.detach())
            return ChunkSums(terms, err, (acts != 0).sum(0))

        made = row_chunked_loss(
            chunk_sums, (rows.x, rows.target, weight), [*self.parameters()], d_sae=self.widest_shard
        )
        return SAELoss(made.total, made.terms, x, made.err, made.counts)

    def _p_norm(self, weighted: Tensor) -> Float[Tensor, " c"]:
        p = self.cfg.lp_norm
        if p == 1:
            return self._over_latents(weighted.abs().sum(-1))
        # Zeros are kept out of the powers, whose slopes there may be infinite.
        some = weighted != 0
        powers = torch.where(some, weighted, 1).abs().pow(p)
        sums = self._over_latents(torch.where(some, powers, 0).sum(-1))
        return torch.where(sums > 0, torch.where(sums > 0, sums, 1).pow(1 / p), 0)

    @property
    def ghost_coefficient(self) -> float:
        return 1.0

    def l1_coefficient(self, step: int) -> float:
        """The weight of the sparsity term at a step: linear from 0 over the warm-up."""
        return warmed_up(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps, step)


def ghost_loss(ghost: Tensor, err: Tensor) -> Float[Tensor, ""]:
    """The term of `use_ghost_grads` for g and e [c, D], summed over rows, averaged over D."""
    half = err.norm(dim=-1) / (2 * ghost.detach().norm(dim=-1) + 1e-6)
    missed = (ghost * half.unsqueeze(-1) + err).square()
    share = err.square() / (missed.detach() + 1e-6)
    return (missed * share).sum() / err.shape[-1]
