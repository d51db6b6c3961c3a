"""Adam over the rows of a dictionary, straight from the pairs that make their gradient."""

from fastsae_kernels.optimizer.api import lazy_row_adam as lazy_row_adam
from fastsae_kernels.optimizer.api import row_adam as row_adam
from fastsae_kernels.optimizer.api import row_grad_norm as row_grad_norm
