"""Exact top k B of a whole batch's acts, without the dense [B, F] pre-activations."""

from fastsae_kernels.batch_topk.api import batch_topk_encode as batch_topk_encode
