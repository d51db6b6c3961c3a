"""Sparse autoencoders. `SAES` is the one list of variants: name in files -> class."""

from fastsae.saes.abstopk import AbsTopKConfig as AbsTopKConfig
from fastsae.saes.abstopk import AbsTopKSAE as AbsTopKSAE
from fastsae.saes.base import SAE as SAE
from fastsae.saes.base import SAELoss as SAELoss
from fastsae.saes.batchtopk import BatchTopKConfig as BatchTopKConfig
from fastsae.saes.batchtopk import BatchTopKSAE as BatchTopKSAE
from fastsae.saes.config import SAEConfig as SAEConfig
from fastsae.saes.gated import GatedConfig as GatedConfig
from fastsae.saes.gated import GatedSAE as GatedSAE
from fastsae.saes.jumprelu import JumpReLUConfig as JumpReLUConfig
from fastsae.saes.jumprelu import JumpReLUSAE as JumpReLUSAE
from fastsae.saes.legacy_standard import LegacyStandardConfig as LegacyStandardConfig
from fastsae.saes.legacy_standard import LegacyStandardSAE as LegacyStandardSAE
from fastsae.saes.matching_pursuit import MatchingPursuitConfig as MatchingPursuitConfig
from fastsae.saes.matching_pursuit import MatchingPursuitSAE as MatchingPursuitSAE
from fastsae.saes.matryoshka_batchtopk import MatryoshkaBatchTopKConfig as MatryoshkaBatchTopKConfig
from fastsae.saes.matryoshka_batchtopk import MatryoshkaBatchTopKSAE as MatryoshkaBatchTopKSAE
from fastsae.saes.skip_transcoder import JumpReLUSkipTranscoder as JumpReLUSkipTranscoder
from fastsae.saes.skip_transcoder import (
    JumpReLUSkipTranscoderConfig as JumpReLUSkipTranscoderConfig,
)
from fastsae.saes.skip_transcoder import SkipTranscoder as SkipTranscoder
from fastsae.saes.skip_transcoder import SkipTranscoderConfig as SkipTranscoderConfig
from fastsae.saes.standard import StandardConfig as StandardConfig
from fastsae.saes.standard import StandardSAE as StandardSAE
from fastsae.saes.temporal import TemporalConfig as TemporalConfig
from fastsae.saes.temporal import TemporalSAE as TemporalSAE
from fastsae.saes.topk import TopKConfig as TopKConfig
from fastsae.saes.topk import TopKSAE as TopKSAE
from fastsae.saes.transcoder import JumpReLUTranscoder as JumpReLUTranscoder
from fastsae.saes.transcoder import JumpReLUTranscoderConfig as JumpReLUTranscoderConfig
from fastsae.saes.transcoder import Transcoder as Transcoder
from fastsae.saes.transcoder import TranscoderConfig as TranscoderConfig

SAES: dict[str, type[SAE]] = {
    "abstopk": AbsTopKSAE,
    "batchtopk": BatchTopKSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "jumprelu_skip_transcoder": JumpReLUSkipTranscoder,
    "jumprelu_transcoder": JumpReLUTranscoder,
    "legacy_standard": LegacyStandardSAE,
    "matching_pursuit": MatchingPursuitSAE,
    "matryoshka_batchtopk": MatryoshkaBatchTopKSAE,
    "skip_transcoder": SkipTranscoder,
    "standard": StandardSAE,
    "temporal": TemporalSAE,
    "topk": TopKSAE,
    "transcoder": Transcoder,
}
