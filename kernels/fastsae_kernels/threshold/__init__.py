"""Every latent above a threshold: ReLU codes, and their nearly dense training step."""

from fastsae_kernels.threshold.api import ReLUL1 as ReLUL1
from fastsae_kernels.threshold.api import relu_l1_loss as relu_l1_loss
from fastsae_kernels.threshold.api import threshold_encode as threshold_encode
