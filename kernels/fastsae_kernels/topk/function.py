import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import Encoder, centred, product_dtype, with_gradients
from fastsae_kernels.code import SparseCode
from fastsae_kernels.shards import Shards, lowest_first
from fastsae_kernels.topk.ops import select_topk


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_pre: Tensor | None,
    scale: Tensor | None,
    W_compute: Tensor | None,
    shards: Shards | None,
    impl: Impl,
) -> SparseCode:
    flat = x.reshape(-1, x.shape[-1])
    encoder = Encoder(flat, W_enc, b_enc, b_pre, scale)
    with torch.no_grad():
        rows = centred(flat, b_pre, product_dtype(flat))
        weight = W_enc if W_compute is None else W_compute
        if shards is None:
            acts, indices = select_topk(rows, weight, b_enc, k, scale, signed=False, impl=impl)
        else:
            acts, indices = lowest_first(
                lambda some, width: select_topk(
                    some, weight, b_enc, width, scale, signed=False, impl=impl
                ),
                rows,
                min(k, len(b_enc)),
                len(b_enc),
            )
            acts = torch.where(shards.keep_topk(acts, k, min(k, shards.widest)), acts, 0)
    acts, groups = with_gradients(None, indices, acts, acts, encoder, W_compute, rows, impl)
    shape = (*x.shape[:-1], acts.shape[1])
    return SparseCode(acts.reshape(shape), indices.reshape(shape), groups)
