"""x_hat = sum_k acts W_dec[indices] + b_dec, from a sparse code."""

from fastsae_kernels.decode.api import sparse_decode as sparse_decode
