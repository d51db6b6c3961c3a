"""Transcoders: from one activation to another. Dunefsky et al. 2024, arXiv 2406.11944."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsae.checks import check_counts
from fastsae.saes.base import SAE, SAELoss, TrainingRows, row_mean
from fastsae.saes.config import SAEConfig
from fastsae.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from fastsae.saes.standard import StandardConfig, StandardSAE


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(StandardConfig):
    """acts = relu(x W_enc + b_enc); y_hat = acts W_dec + b_dec, of another width than x."""

    architecture: ClassVar[str] = "transcoder"

    d_out: int = 768
    """Width of what is predicted."""
    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(frozen=True, kw_only=True)
class JumpReLUTranscoderConfig(JumpReLUConfig):
    """A transcoder whose latents have thresholds, as those of a JumpReLU SAE."""

    architecture: ClassVar[str] = "jumprelu_transcoder"

    d_out: int = 768
    """Width of what is predicted."""
    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


def _check(cfg: SAEConfig) -> None:
    check_counts(cfg, "d_out")
    if cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input must be False for a transcoder, whose b_dec has d_out entries, "
            "got True"
        )
    if cfg.reshape_activations != "none":
        raise ValueError(
            f"reshape_activations must be 'none' for a transcoder, got {cfg.reshape_activations!r}"
        )


class Transcodes(SAE):
    """What makes a transcoder of an SAE: a target of its own, and no way back to the input."""

    _loss: Callable[..., SAELoss]

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_parameters(dtype, device)
        # Input and output are different spaces: nothing ties the two directions of a latent.
        self.W_enc = nn.Parameter(self._initial_rows(self.cfg.d_in, device).to(dtype).t())

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D_out"]:
        """decode(encode(x)); through dense acts where a gradient is wanted."""
        y_hat = self.decode(self.encode(x) if torch.is_grad_enabled() else self.encode_sparse(x))
        y_hat = y_hat.reshape(*x.shape[:-1], self.cfg.d_out)
        return (y_hat + self._skipped(x.to(self.dtype))).to(x.dtype)

    def loss(
        self,
        x: Float[Tensor, "B D"],
        dead: Bool[Tensor, " F"] | None = None,
        step: int = 0,
        *,
        target: Float[Tensor, "B D_out"],
    ) -> SAELoss:
        """The training loss of predicting `target` from x."""
        if target.shape != (*x.shape[:-1], self.cfg.d_out):
            raise ValueError(
                f"target must have shape [B, D_out] = {[*x.shape[:-1], self.cfg.d_out]}, "
                f"got {list(target.shape)}"
            )
        skipped = self._skipped(x.to(self.dtype))
        left = target - (skipped.detach() if isinstance(skipped, Tensor) else 0)
        found = self._loss(x, TrainingRows(self._normalise(x), left, None), dead, step)
        total = found.total
        if isinstance(skipped, Tensor):
            # Of value 0: the losses above take their target as a constant.
            per_row = 2 / len(x) * found.err * (skipped - skipped.detach())
            total = total + per_row.sum()
        return replace(found, total=total, target=target)

    @torch.no_grad()
    def initialise(
        self,
        rows: Float[Tensor, "N D"],
        targets: Float[Tensor, "N D_out"] | None = None,
        *,
        centre: Callable[[Tensor], Tensor] = row_mean,
    ) -> None:
        """Start from a sample: b_dec at the targets' centre."""
        if targets is not None:
            self.b_dec.copy_(centre(targets))

    @torch.no_grad()
    def fold_activation_scale(self, scale: float, target_scale: float = 1.0) -> None:
        """Make a transcoder trained from `scale * x` to `target_scale * y` one from x to y."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(target_scale)
        self.b_dec.div_(target_scale)
        if self.cfg.normalize_activations == "expected_average_only_in":
            self.cfg = replace(self.cfg, normalize_activations="none")

    def _restore(self, x_hat: Tensor) -> Tensor:
        return x_hat


class Transcoder(Transcodes, StandardSAE):
    config_class = TranscoderConfig
    cfg: TranscoderConfig


class JumpReLUTranscoder(Transcodes, JumpReLUSAE):
    config_class = JumpReLUTranscoderConfig
    cfg: JumpReLUTranscoderConfig
