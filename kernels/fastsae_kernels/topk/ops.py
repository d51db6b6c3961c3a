"""The exact selection without a [B, F] tensor, as a registered op."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl


def select_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None,
    *,
    signed: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """acts, indices [B, k] of the k largest (x W_enc + b_enc) * scale, of their ReLU unless signed.

    By value descending, lowest index first among equals. The product is made in x's dtype,
    everything after it in fp32 at least.
    """
    return _select_topk(x, W_enc, b_enc, k, scale, signed, impl.value)


@torch.library.custom_op("fastsae::select_topk", mutates_args=())
def _select_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None,
    signed: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == Impl.TRITON:
        from fastsae_kernels.topk import kernel

        if kernel.fits(W_enc.shape[1], k):
            return kernel.select_topk(x, W_enc, b_enc, k, scale, signed)
    from fastsae_kernels.topk.eager import select_topk as run

    return run(x, W_enc, b_enc, k, scale, signed)


@_select_topk.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None,
    signed: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    acts = x.new_empty(x.shape[0], k, dtype=torch.promote_types(x.dtype, torch.float32))
    return acts, torch.empty_like(acts, dtype=torch.int32)
