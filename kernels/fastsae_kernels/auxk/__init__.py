"""AuxK: dead latents learn what the live ones left over."""

from fastsae_kernels.auxk.api import aux_topk as aux_topk
