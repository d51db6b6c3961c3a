"""Transcoders with an affine skip: what is linear in x needs no latents. Paulo et al. 2025."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsae.saes.transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    Transcoder,
    TranscoderConfig,
    Transcodes,
)


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """y_hat = relu(x W_enc + b_enc) W_dec + b_dec + x W_skip^T, W_skip [D_out, D]."""

    architecture: ClassVar[str] = "skip_transcoder"


@dataclass(frozen=True, kw_only=True)
class JumpReLUSkipTranscoderConfig(JumpReLUTranscoderConfig):
    """A JumpReLU transcoder with x W_skip^T added to its output."""

    architecture: ClassVar[str] = "jumprelu_skip_transcoder"


class _Skips(Transcodes):
    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_parameters(dtype, device)
        shape = (self.cfg.d_out, self.cfg.d_in)
        self.W_skip = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    def _skipped(self, x: Tensor) -> Tensor:
        return x @ self.W_skip.t()

    @torch.no_grad()
    def fold_activation_scale(self, scale: float, target_scale: float = 1.0) -> None:
        super().fold_activation_scale(scale, target_scale)
        self.W_skip.mul_(scale / target_scale)


class SkipTranscoder(_Skips, Transcoder):
    config_class = SkipTranscoderConfig
    cfg: SkipTranscoderConfig


class JumpReLUSkipTranscoder(_Skips, JumpReLUTranscoder):
    config_class = JumpReLUSkipTranscoderConfig
    cfg: JumpReLUSkipTranscoderConfig
