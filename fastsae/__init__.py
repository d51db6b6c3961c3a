"""Sparse autoencoders for language models: one dense GEMM a step, no dense latents."""

from fastsae.data.batches import ShuffledRows as ShuffledRows
from fastsae.saes import SAE as SAE
from fastsae.saes import SAES as SAES
from fastsae.saes import SAEConfig as SAEConfig
from fastsae.saes import SAELoss as SAELoss
from fastsae.saes import StandardConfig as StandardConfig
from fastsae.saes import StandardSAE as StandardSAE
from fastsae.saes import TopKConfig as TopKConfig
from fastsae.saes import TopKSAE as TopKSAE
from fastsae.training import OptimizerConfig as OptimizerConfig
from fastsae.training import TrainConfig as TrainConfig
from fastsae.training import Trainer as Trainer
