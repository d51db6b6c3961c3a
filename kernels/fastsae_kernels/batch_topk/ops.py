"""The exact selection over a batch without a [B, F] tensor, as a registered op."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl


def select_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, scale: Tensor | None, impl: Impl
) -> tuple[Tensor, Tensor, Tensor]:
    """row_offsets [B + 1], indices [n_kept], acts [n_kept]: the largest of a batch.

    Of relu((x W_enc + b_enc) * scale), with 0 <= n_kept <= B F. Latents ascend within a row. The
    product is made in x's dtype, everything after it in fp32 at least.
    """
    return _select_batch_topk(x, W_enc, b_enc, n_kept, scale, impl.value)


@torch.library.custom_op("fastsae::select_batch_topk", mutates_args=())
def _select_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, scale: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == Impl.TRITON:
        from fastsae_kernels.batch_topk import kernel

        if kernel.fits(len(x), W_enc.shape[1], n_kept):
            return kernel.select_batch_topk(x, W_enc, b_enc, n_kept, scale)
    from fastsae_kernels.batch_topk.eager import select_batch_topk as run

    return run(x, W_enc, b_enc, n_kept, scale)


@_select_batch_topk.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, scale: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    row_offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    acts = x.new_empty(n_kept, dtype=torch.promote_types(x.dtype, torch.float32))
    return row_offsets, torch.empty_like(acts, dtype=torch.int32), acts
