"""The pairs above a threshold, and the dense step of a ReLU SAE, as registered ops."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl


def select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, limit: Tensor, impl: Impl
) -> tuple[Tensor, Tensor, Tensor]:
    """row_offsets [B + 1], indices [nnz], values [nnz]: every (x W_enc + b_enc) * scale > limit.

    `limit` is [F] in the dtype of the values, which is fp32 at least; the product is made in x's.
    Latents ascend within a row; NaN counts as above. How many there are shapes the outputs, so this
    waits for the device.
    """
    return _select_above(x, W_enc, b_enc, scale, limit, impl.value)


@torch.library.custom_op("fastsae::select_above", mutates_args=())
def _select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, limit: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == Impl.TRITON:
        from fastsae_kernels.threshold.kernel import select_above as run_sparse

        found = run_sparse(x, W_enc, b_enc, scale, limit)
        if found is not None:
            return found
    from fastsae_kernels.threshold.eager import select_above as run

    return run(x, W_enc, b_enc, scale, limit)


@_select_above.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, limit: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    row_offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    return row_offsets, x.new_empty(nnz, dtype=torch.int32), limit.new_empty(nnz)


def relu_l1_sums(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    b_pre: Tensor | None,
    l1_coefficient: float,
    lp_norm: float,
    needs_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mse [], l1 [], err [B, D], counts [F] int64, and the gradients of mse + l1_coefficient * l1.

    Those are d_enc [F, D], d_b_enc [F], d_dec [F, D], empty if not needed. Dense products, chunk by
    chunk: one implementation on every device.
    """
    return _relu_l1_sums(x, W_enc, b_enc, W_dec, b_dec, b_pre, l1_coefficient, lp_norm, needs_grads)


@torch.library.custom_op("fastsae::relu_l1_sums", mutates_args=())
def _relu_l1_sums(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    b_pre: Tensor | None,
    l1_coefficient: float,
    lp_norm: float,
    needs_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastsae_kernels.threshold.dense_step import relu_l1_sums as run

    return run(x, W_enc, b_enc, W_dec, b_dec, b_pre, l1_coefficient, lp_norm, needs_grads)


@_relu_l1_sums.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    b_pre: Tensor | None,
    l1_coefficient: float,
    lp_norm: float,
    needs_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    d_sae, d_out = W_dec.shape
    shapes = ((d_sae, d_out), (d_sae,), (d_sae, d_out)) if needs_grads else ((0,),) * 3
    d_enc, d_b_enc, d_dec = (scalar.new_empty(shape) for shape in shapes)
    err, counts = scalar.new_empty(x.shape[0], d_out), x.new_empty(d_sae, dtype=torch.int64)
    return scalar, torch.empty_like(scalar), err, counts, d_enc, d_b_enc, d_dec
