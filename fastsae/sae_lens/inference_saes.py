"""SAEs for use under SAELens's names and with its defaults: made from a configuration."""

from dataclasses import dataclass

from fastsae import saes
from fastsae.sae_lens.hooked_sae import hooked_class


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """What SAELens's configurations say beside the mathematics."""

    device: str = "cpu"
    """Where the SAE is made."""


@dataclass(frozen=True, kw_only=True)
class StandardSAEConfig(OnDevice, saes.StandardConfig): ...


@dataclass(frozen=True, kw_only=True)
class GatedSAEConfig(OnDevice, saes.GatedConfig): ...


@dataclass(frozen=True, kw_only=True)
class TopKSAEConfig(OnDevice, saes.TopKConfig):
    k: int = 100
    rescale_acts_by_decoder_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class AbsTopKSAEConfig(OnDevice, saes.AbsTopKConfig):
    k: int = 100
    rescale_acts_by_decoder_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class JumpReLUSAEConfig(OnDevice, saes.JumpReLUConfig): ...


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitSAEConfig(OnDevice, saes.MatchingPursuitConfig): ...


@dataclass(frozen=True, kw_only=True)
class TemporalSAEConfig(OnDevice, saes.TemporalConfig): ...


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(OnDevice, saes.TranscoderConfig): ...


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(OnDevice, saes.SkipTranscoderConfig): ...


@dataclass(frozen=True, kw_only=True)
class JumpReLUTranscoderConfig(OnDevice, saes.JumpReLUTranscoderConfig): ...


@dataclass(frozen=True, kw_only=True)
class JumpReLUSkipTranscoderConfig(OnDevice, saes.JumpReLUSkipTranscoderConfig): ...


# The very classes that loading returns, so that isinstance holds.
StandardSAE = hooked_class(saes.StandardSAE)
GatedSAE = hooked_class(saes.GatedSAE)
TopKSAE = hooked_class(saes.TopKSAE)
AbsTopKSAE = hooked_class(saes.AbsTopKSAE)
JumpReLUSAE = hooked_class(saes.JumpReLUSAE)
MatchingPursuitSAE = hooked_class(saes.MatchingPursuitSAE)
TemporalSAE = hooked_class(saes.TemporalSAE)
Transcoder = hooked_class(saes.Transcoder)
SkipTranscoder = hooked_class(saes.SkipTranscoder)
JumpReLUTranscoder = hooked_class(saes.JumpReLUTranscoder)
JumpReLUSkipTranscoder = hooked_class(saes.JumpReLUSkipTranscoder)
