"""The AuxK loss of a batch with every gradient of it, as a registered op."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl


def aux_topk_sums(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], latents [n], and the loss's gradients over the n dead latents' rows.

    Those are d_enc [n, D], d_b_enc [n], d_dec [n, D_out]. The number of dead latents shapes the
    work, so this waits for the device.
    """
    return _aux_topk_sums(x, err, dead, W_enc, b_enc, W_dec, b_pre, scale, absolute, impl.value)


@torch.library.custom_op("fastsae::aux_topk_sums", mutates_args=())
def _aux_topk_sums(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastsae_kernels.auxk.eager import aux_topk_sums as run

    return run(x, err, dead, W_enc, b_enc, W_dec, b_pre, scale, absolute, Impl(impl))


@_aux_topk_sums.register_fake
def _(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=wide),
        dead.new_empty(n, dtype=torch.int64),
        x.new_empty(n, W_enc.shape[0], dtype=wide),
        x.new_empty(n, dtype=wide),
        x.new_empty(n, W_dec.shape[1], dtype=wide),
    )
