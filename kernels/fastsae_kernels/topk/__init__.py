"""Exact top-k of the encoder's output, without the dense [B, F] pre-activations."""

from fastsae_kernels.topk.api import topk_encode as topk_encode
