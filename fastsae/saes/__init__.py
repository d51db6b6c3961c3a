"""Sparse autoencoders. `SAES` is the one list of variants: name in files -> class."""

from fastsae.saes.base import SAE as SAE
from fastsae.saes.base import SAEConfig as SAEConfig
from fastsae.saes.base import SAELoss as SAELoss
from fastsae.saes.standard import StandardConfig as StandardConfig
from fastsae.saes.standard import StandardSAE as StandardSAE
from fastsae.saes.topk import TopKConfig as TopKConfig
from fastsae.saes.topk import TopKSAE as TopKSAE

SAES: dict[str, type[SAE]] = {
    "standard": StandardSAE,
    "topk": TopKSAE,
}
