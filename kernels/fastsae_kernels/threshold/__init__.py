"""Every latent above a threshold: ReLU and JumpReLU codes, and the nearly dense ReLU step."""

from fastsae_kernels.threshold.api import JumpReLUCode as JumpReLUCode
from fastsae_kernels.threshold.api import ReLUL1 as ReLUL1
from fastsae_kernels.threshold.api import jumprelu_encode as jumprelu_encode
from fastsae_kernels.threshold.api import relu_l1_loss as relu_l1_loss
from fastsae_kernels.threshold.api import threshold_encode as threshold_encode
