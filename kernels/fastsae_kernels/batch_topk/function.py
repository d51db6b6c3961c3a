import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import Encoder, centred, product_dtype, with_gradients
from fastsae_kernels.batch_topk.ops import select_batch_topk
from fastsae_kernels.code import RaggedCode


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    n_kept: int,
    b_pre: Tensor | None,
    scale: Tensor | None,
    W_compute: Tensor | None,
    impl: Impl,
) -> RaggedCode:
    encoder = Encoder(x, W_enc, b_enc, b_pre, scale)
    with torch.no_grad():
        rows = centred(x, b_pre, product_dtype(x))
        weight = W_enc if W_compute is None else W_compute
        found = select_batch_topk(rows, weight, b_enc, n_kept, scale, impl)
    row_offsets, indices, acts = found
    acts, groups = with_gradients(*found, acts, encoder, W_compute, rows, impl)
    return RaggedCode(row_offsets, indices, acts, groups)
