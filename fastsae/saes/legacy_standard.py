"""The standard SAE under the loss that SAELens's classic L1 recipes were written for."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.saes.base import SAELoss, TrainingRows
from fastsae.saes.standard import StandardConfig, StandardSAE


@dataclass(frozen=True, kw_only=True)
class LegacyStandardConfig(StandardConfig):
    """loss = mean over rows and D of (x_hat - x)^2 + l1_coefficient * mean over rows of |acts|_1.

    It is the standard loss with the L1 weight D * l1_coefficient, divided by D, so that W_dec is
    meant to be kept at unit norm (`OptimizerConfig.unit_norm_decoder`): norms of its rows weigh the
    acts as in `StandardConfig`. Bricken et al. 2023 (Towards Monosemanticity).
    """

    architecture: ClassVar[str] = "legacy_standard"

    l1_coefficient: float = 1e-3
    decoder_init_norm: float = 1.0
    mse_loss_normalization: Literal["dense_batch"] | None = None
    """`dense_batch` divides a row's squared error by |x - mean x|, the mean being the batch's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mse_loss_normalization not in (None, "dense_batch"):
            raise ValueError(
                "mse_loss_normalization must be 'dense_batch' or None, got "
                f"{self.mse_loss_normalization!r}"
            )

    @property
    def equivalent_l1_coefficient(self) -> float:
        """The weight that gives today's loss the same minimum, without `dense_batch`."""
        return self.l1_coefficient * self.d_in


class LegacyStandardSAE(StandardSAE):
    config_class = LegacyStandardConfig
    cfg: LegacyStandardConfig

    def __init__(self, cfg: LegacyStandardConfig, **where: Any) -> None:
        super().__init__(cfg, **where)
        # Half of the latents fire at first: with encoder rows of this norm x_hat starts near x.
        self.W_enc.data.mul_(min(1.0, 2 * cfg.d_in / cfg.d_sae))

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        rows = self._training_rows(x)
        found = self._loss(x, rows, dead, step)
        d_in = self.cfg.d_in
        err = found.err
        if self.cfg.mse_loss_normalization is not None:  # the log's errors are in units of x
            err = err * self._centred_norms(rows).sqrt().unsqueeze(-1)
        terms = {name: value / d_in for name, value in found.terms.items()}
        return replace(found, total=found.total / d_in, terms=terms, err=err)

    def l1_coefficient(self, step: int) -> float:
        return self.cfg.d_in * super().l1_coefficient(step)

    @property
    def ghost_coefficient(self) -> float:
        return float(self.cfg.d_in)

    def inference_form(self) -> StandardSAE:
        """A plain StandardSAE over the same weights: only the loss is of another time."""
        fields = {k: v for k, v in vars(self.cfg).items() if k != "mse_loss_normalization"}
        fields["l1_coefficient"] = self.cfg.equivalent_l1_coefficient
        sae = StandardSAE(StandardConfig(**fields), device=torch.device("meta"), shards=self.shards)
        sae.load_state_dict(self.state_dict(), assign=True)
        return sae

    def _training_rows(self, x: Tensor) -> TrainingRows:
        rows = super()._training_rows(x)
        if self.cfg.mse_loss_normalization is None:
            return rows
        weight = 1 / self._centred_norms(rows)
        return rows._replace(weight=weight if rows.weight is None else weight * rows.weight)

    def _centred_norms(self, rows: TrainingRows) -> Float[Tensor, " B"]:
        wide = rows.target.float()
        return (wide - self._over_parts(wide.mean(0))).norm(dim=-1) + 1e-6
