"""Mean squared error and L1 of a sparse code, with the gradient of the activations in one pass."""

from fastsae_kernels.loss.api import MSEL1 as MSEL1
from fastsae_kernels.loss.api import mse_l1_loss as mse_l1_loss
