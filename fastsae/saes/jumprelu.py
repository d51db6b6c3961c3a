"""JumpReLU SAE: a threshold learned for each latent. Rajamanoharan et al. 2024, 2407.14435."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsae.checks import check_choice, check_counts
from fastsae.saes.base import SAE, SAELoss, TrainingRows, warmed_up
from fastsae.saes.config import SAEConfig
from fastsae.saes.density import is_sparse
from fastsae_kernels import (
    ChunkSums,
    RaggedCode,
    group_by_latent,
    jumprelu_encode,
    row_chunked_loss,
    threshold_encode,
)

SparsityLoss = Literal["step", "tanh", "quadratic"]


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SAEConfig):
    """h = (x - b_dec) W_enc + b_enc; acts = h where h > threshold, else 0.

    With l0 the number of active latents of a row and n = |W_dec rows|, loss = mse + l0_coefficient
    times the mean over rows of

        step       l0
        tanh       sum_j tanh(jumprelu_tanh_scale acts_j n_j)
        quadratic  2 / target_l0 (l0 - target_l0)^2

    and, where asked for, + pre_act_loss_coefficient mean_b sum over dead j of
    relu(threshold_j - h_j) n_j. Anthropic's January 2025 update has tanh and the last term, Gemma
    Scope 2 the quadratic one.
    """

    architecture: ClassVar[str] = "jumprelu"

    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05
    """Width of the band around the threshold over which the step's derivative is taken."""
    jumprelu_sparsity_loss_mode: SparsityLoss = "step"
    l0_coefficient: float = 1.0
    l0_warm_up_steps: int = 0
    """Steps over which l0_coefficient rises from 0."""
    pre_act_loss_coefficient: float | None = None
    """Weight of the term that brings dead latents back; None: without."""
    jumprelu_tanh_scale: float = 4.0
    jumprelu_ste_to_input: bool = False
    """Whether the step's derivative also reaches the encoder, not the threshold alone."""
    target_l0: float | None = None
    """Of the quadratic loss."""
    frequency_coefficient: float = 0.0
    """Weight of sum_j f_j max(0, log10(f_j / target_frequency)) with f_j the share of a batch's
    rows on which latent j fires: latents that fire nearly always pay more than their count."""
    target_frequency: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "jumprelu_sparsity_loss_mode", get_args(SparsityLoss))
        if not self.jumprelu_bandwidth > 0:
            raise ValueError(f"jumprelu_bandwidth must be above 0, got {self.jumprelu_bandwidth}")
        if self.jumprelu_init_threshold < 0:
            raise ValueError(
                f"jumprelu_init_threshold must be at least 0, got {self.jumprelu_init_threshold}"
            )
        check_counts(self, "l0_warm_up_steps", least=0)
        if self.jumprelu_sparsity_loss_mode == "quadratic" and not (
            self.target_l0 is not None and 0 < self.target_l0 <= self.d_sae
        ):
            raise ValueError(
                f"target_l0 must be in (0, d_sae] with d_sae = {self.d_sae} for the quadratic "
                f"loss, got {self.target_l0}"
            )


class JumpReLUSAE(SAE):
    config_class = JumpReLUConfig
    cfg: JumpReLUConfig

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_parameters(dtype, device)
        # In bf16 a threshold of 0.01 could not move by a learning rate's steps.
        threshold = torch.full(
            (len(self.latents),), self.cfg.jumprelu_init_threshold, device=device
        )
        self.threshold = nn.Parameter(threshold)

    def _apply(self, fn: Any, recurse: bool = True) -> "JumpReLUSAE":
        precise = self.threshold.detach()
        super()._apply(fn, recurse)
        if self.threshold.dtype != precise.dtype:
            self.threshold.data = precise.to(self.threshold.device)
        return self

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> RaggedCode:
        """The latents above their thresholds; leading axes of x are flattened into B rows."""
        rows = self.prepare(x).reshape(-1, self.cfg.d_in)
        return threshold_encode(
            rows,
            self.W_enc,
            self.b_enc,
            threshold=self.threshold.detach(),
            b_pre=self.b_pre,
            impl=self.impl,
        )

    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense acts, differentiable."""
        return self.acts_of(self.pre_acts(x), x).to(x.dtype)

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        return pre_acts.relu() * (pre_acts > self.threshold)

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
        coefficient = self.l0_coefficient(step)
        with torch.no_grad():
            self.threshold.clamp_min_(0)
        if self._takes_pairs(rows.x, dead):
            return self._sparse_loss(x, rows, coefficient)
        return self._dense_loss(x, rows, coefficient, dead)

    def l0_coefficient(self, step: int) -> float:
        """The weight of the sparsity term at a step: linear from 0 over the warm-up."""
        return warmed_up(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps, step)

    def _takes_pairs(self, x: Tensor, dead: Tensor | None) -> bool:
        """Whether active pairs and those of the band are all that the loss reads, and few."""
        cfg = self.cfg
        reads_more = (
            cfg.jumprelu_sparsity_loss_mode == "tanh"
            or cfg.jumprelu_ste_to_input
            or cfg.frequency_coefficient
            or (cfg.pre_act_loss_coefficient is not None and dead is not None)
        )
        low = (self.threshold.detach() - cfg.jumprelu_bandwidth / 2).clamp_min(0)
        return not reads_more and is_sparse(self, x, low)

    def _sparse_loss(self, x: Tensor, rows: TrainingRows, coefficient: float) -> SAELoss:
        code, l0 = jumprelu_encode(
            rows.x,
            self.W_enc,
            self.b_enc,
            self.threshold,
            self.cfg.jumprelu_bandwidth,
            b_pre=self.b_pre,
            W_compute=self.compute_copies.get("W_enc"),
            impl=self.impl,
        )
        mse, _, err = self._reconstruction(rows, code)
        sparsity = coefficient * self._row_sparsity(self._over_latents(l0)).mean()
        groups = code.groups or group_by_latent(code, len(self.latents), impl=self.impl)
        terms = {"mse": mse.detach(), "l0": sparsity.detach()}
        return SAELoss(mse + sparsity, terms, x, err, groups.counts(), code)

    def _row_sparsity(self, l0: Tensor) -> Tensor:
        if self.cfg.jumprelu_sparsity_loss_mode == "step":
            return l0
        assert self.cfg.target_l0 is not None
        return 2 / self.cfg.target_l0 * (l0 - self.cfg.target_l0).square()

    def _dense_loss(
        self, x: Tensor, rows: TrainingRows, coefficient: float, dead: Tensor | None
    ) -> SAELoss:
        cfg = self.cfg
        weight = x.new_ones(len(x)) if rows.weight is None else rows.weight
        frequency_weight = self._frequency_weight(rows.x) if cfg.frequency_coefficient else None

        def chunk_sums(z: Tensor, target: Tensor, weight: Tensor) -> ChunkSums:
            threshold = self.threshold.to(torch.promote_types(z.dtype, torch.float32))
            z = z.to(threshold.dtype)
            h = (z if self.b_pre is None else z - self.b_pre) @ self.W_enc + self.b_enc
            acts = _Jump.apply(h, threshold, cfg.jumprelu_bandwidth, cfg.jumprelu_ste_to_input)
            assert isinstance(acts, Tensor)
            err = self._over_latents(acts @ self.W_dec) + self.b_dec - target
            terms = {"mse": (err.square().sum(-1) * weight).sum()}
            fires = _Step.apply(h, threshold, cfg.jumprelu_bandwidth, cfg.jumprelu_ste_to_input)
            assert isinstance(fires, Tensor)
            norms = self.decoder_norms()
            if cfg.jumprelu_sparsity_loss_mode == "tanh":
                tanh = torch.tanh(cfg.jumprelu_tanh_scale * acts * norms).sum(-1)
                sparsity = self._over_latents(tanh)
            else:
                sparsity = self._row_sparsity(self._over_latents(fires.sum(-1)))
            terms["l0"] = coefficient * sparsity.sum()
            if frequency_weight is not None:
                terms["frequency"] = coefficient * self._over_latents(
                    (fires * frequency_weight).sum()
                )
            if cfg.pre_act_loss_coefficient is not None and dead is not None:
                short = (threshold - h).relu() * dead * norms
                terms["pre_act"] = cfg.pre_act_loss_coefficient * self._over_latents(short.sum())
            err = err * weight.sqrt().unsqueeze(-1)
            return ChunkSums(terms, err, (acts != 0).sum(0))

        made = row_chunked_loss(
            chunk_sums, (rows.x, rows.target, weight), [*self.parameters()], d_sae=self.widest_shard
        )
        return SAELoss(made.total, made.terms, x, made.err, made.counts)

    @torch.no_grad()
    def _frequency_weight(self, x: Tensor) -> Float[Tensor, " F"]:
        """frequency_coefficient * max(0, log10(f / target_frequency)), f from this batch."""
        code = threshold_encode(
            x, self.W_enc, self.b_enc, threshold=self.threshold, b_pre=self.b_pre, impl=self.impl
        )
        fired = code.indices.bincount(minlength=len(self.latents)) / len(x)
        excess = (self._over_parts(fired) / self.cfg.target_frequency).clamp_min(1).log10()
        return self.cfg.frequency_coefficient * excess

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Give W_dec unit rows, and the encoder and the thresholds their norms."""
        norms = self.decoder_norms().clamp_min(1e-8)
        super().fold_W_dec_norm()
        self.threshold.mul_(norms)


class _Jump(torch.autograd.Function):
    """h where h > threshold; d / d threshold = -threshold / bandwidth inside the band."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        # "Not at or below" rather than "above": NaN passes and stays visible.
        above = (h <= threshold).logical_not()
        ctx.save_for_backward(h, threshold, above)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return torch.where(above, h, 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold, above = ctx.saved_tensors
        slope = _in_band(h, threshold, ctx.bandwidth) * (threshold / ctx.bandwidth) * g
        d_h = torch.where(above, g, 0)
        return d_h + slope if ctx.to_input else d_h, -slope.sum(0), None, None


class _Step(torch.autograd.Function):
    """1 where h > threshold; d / d threshold = -1 / bandwidth inside the band."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        slope = _in_band(h, threshold, ctx.bandwidth) / ctx.bandwidth * g
        return slope if ctx.to_input else None, -slope.sum(0), None, None


def _in_band(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((h - threshold).abs() < bandwidth / 2).to(h.dtype)
