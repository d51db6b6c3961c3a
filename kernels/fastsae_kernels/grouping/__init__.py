"""Active pairs, sorted by latent."""

from fastsae_kernels.grouping.api import group_by_latent as group_by_latent
