from typing import NamedTuple

from torch import Tensor

from fastsae_kernels._checks import (
    check_code,
    check_float,
    check_rows,
    check_same_device,
    check_shape,
)
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import SparseCode


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
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None = None,
    *,
    impl: Impl | str = Impl.AUTO,
) -> MSEL1:
    """Decode a sparse code and measure it: mse = mean_b |x_hat - x|^2, l1 = mean_b sum_k |acts| w.

    With x_hat[b] = sum_k acts[b, k] W_dec[indices[b, k]] + b_dec. The gradient of the activations
    is made in the forward pass, while the rows of W_dec are at hand; what is saved is indices,
    acts, their gradient and err, never x_hat. Each loss takes its own incoming gradient, which
    reach code.acts, W_dec, b_dec and l1_weight; x is a constant.

    Args:
        x: [..., D] targets (D is W_dec's, which need not be the encoder's).
        code: acts and indices [..., K].
        W_dec: [F, D].
        b_dec: [D].
        l1_weight: [F], usually the norms of W_dec's rows, or None for ones.
        impl: `auto`, `eager` or `reference`.

    Returns:
        `MSEL1(mse, l1, err)` in the dtype of `code.acts`.

    Raises:
        ValueError: a shape or a device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_float("W_dec", W_dec)
    check_shape("W_dec", W_dec, "[F, D]", (None, None))
    check_rows("x", x, W_dec.shape[1])
    check_shape("b_dec", b_dec, "[D]", (W_dec.shape[1],))
    check_code(code.acts, code.indices)
    if x.shape[:-1] != code.acts.shape[:-1]:
        raise ValueError(
            "x and code.acts must have the same leading shape, "
            f"got {list(x.shape[:-1])} and {list(code.acts.shape[:-1])}"
        )
    if l1_weight is not None:
        check_shape("l1_weight", l1_weight, "[F]", (W_dec.shape[0],))
    check_same_device(x=x, acts=code.acts, W_dec=W_dec, b_dec=b_dec, l1_weight=l1_weight)
    if resolve_impl(impl, x.device) is Impl.REFERENCE:
        from fastsae_kernels.loss.reference import mse_l1_loss as run
    else:
        from fastsae_kernels.loss.eager import mse_l1_loss as run
    return MSEL1(*run(x, code, W_dec, b_dec, l1_weight))
