from typing import NamedTuple

from torch import Tensor

from fastsae_kernels._checks import (
    check_bias,
    check_code,
    check_decoder,
    check_float,
    check_same_device,
    check_shape,
)
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import RaggedCode, SparseCode
from fastsae_kernels.shards import Shards, check_shards


class MSEL1(NamedTuple):
    """Losses without their coefficients, and the error they were made of."""

    mse: Tensor
    """0-dim: mean over rows of the squared error summed over D."""
    l1: Tensor
    """0-dim: mean over rows of sum_k |acts| * l1_weight."""
    err: Tensor
    """[..., D]: x_hat - x, detached."""


def mse_l1_loss(
    x: Tensor,
    code: SparseCode | RaggedCode,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    W_compute: Tensor | None = None,
    shards: Shards | None = None,
    impl: Impl | str = Impl.AUTO,
) -> MSEL1:
    """Decode a sparse code and measure it: mse = mean_b |x_hat - x|^2, l1 = mean_b sum_k |acts| w.

    With x_hat[b] = sum_k acts[b, k] W_dec[indices[b, k]] + b_dec. The gradient of the activations
    is made in the forward pass, while the rows of W_dec are at hand; what is saved is indices,
    acts, their gradient and err, never x_hat. Each loss takes its own incoming gradient, which
    reach code.acts, W_dec, b_dec and l1_weight; x is a constant.

    Args:
        x: [..., D] targets (D is W_dec's, which need not be the encoder's), or [..., T, D].
        code: acts and indices [..., K], or a ragged code of B rows.
        W_dec: [F, D], or [F, T, D] for T targets, whose errors are summed like those of D;
            `triton` wants a row's elements side by side.
        b_dec: [D] or [T, D].
        l1_weight: [F], usually the norms of W_dec's rows, or None for ones.
        row_weight: [...] >= 0, a constant: each mean over rows becomes
            sum_b row_weight_b (.)_b / sum_b row_weight_b. A row of weight 0 is left
            out, NaN or not, and its err means nothing. None: ones.
        W_compute: a copy of W_dec in a cheaper dtype to read instead; gradients go to W_dec.
        shards: the holders of the other latents where W_dec is a shard: x_hat and l1 are sums over
            all shards, each of which gets its own latents' gradients, and all that of b_dec. None:
            W_dec is whole.
        impl: `auto`, `triton`, `eager` or `reference` (which reads W_dec itself).

    Returns:
        `MSEL1(mse, l1, err)` in the dtype of `code.acts`.

    Raises:
        ValueError: a shape or a device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_bias("b_dec", b_dec)
    check_decoder(W_dec, b_dec)
    check_float("x", x)
    check_code(code, W_dec.shape[0])
    ragged = isinstance(code, RaggedCode)
    lead = (len(code.row_offsets) - 1,) if ragged else tuple(code.acts.shape[:-1])
    letters = "[B, D]" if ragged else "[..., D]"
    if W_dec.ndim == 3:
        letters = letters.replace("D", "T, D")
    check_shape("x", x, f"{letters} with code's leading shape", (*lead, *W_dec.shape[1:]))
    if l1_weight is not None:
        check_float("l1_weight", l1_weight)
        check_shape("l1_weight", l1_weight, "[F]", (W_dec.shape[0],))
    if row_weight is not None:
        check_float("row_weight", row_weight)
        check_shape("row_weight", row_weight, "x's leading shape", lead)
    if W_compute is not None:
        check_float("W_compute", W_compute)
        check_shape("W_compute", W_compute, "W_dec's", tuple(W_dec.shape))
    check_same_device(
        x=x,
        acts=code.acts,
        W_dec=W_dec,
        b_dec=b_dec,
        l1_weight=l1_weight,
        row_weight=row_weight,
        W_compute=W_compute,
    )
    impl = resolve_impl(impl, x.device, dtypes=(x.dtype, code.acts.dtype, W_dec.dtype))
    check_shards(shards, impl)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.loss.reference import mse_l1_loss as reference

        return MSEL1(*reference(x, code, W_dec, b_dec, l1_weight, row_weight))
    from fastsae_kernels.loss.function import mse_l1_loss as run

    return MSEL1(*run(x, code, W_dec, b_dec, l1_weight, row_weight, W_compute, shards, impl))
