from typing import NamedTuple

from torch import Tensor

from fastsae_kernels._checks import check_float, check_rows, check_same_device, check_shape
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import RaggedCode


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    threshold: float = 0.0,
    b_pre: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> RaggedCode:
    """Every value of (x - b_pre) W_enc + b_enc above `threshold` >= 0, row by row.

    A ReLU code for threshold 0. The number of values is only known once they are: on a GPU this
    waits for the device once a block of rows. Not differentiable; a ReLU SAE is trained through
    `relu_l1_loss`. NaN counts as above.

    Args:
        x: [B, D] rows.
        W_enc, b_enc, b_pre: as in `topk_encode`.
        threshold: the smallest value that is left out.
        impl: `auto`, `eager` or `reference`.

    Returns:
        `RaggedCode` of B rows.

    Raises:
        ValueError: a shape, a device or the threshold breaks the rule it names.
        TypeError: a dtype does.
    """
    _check(x, W_enc, b_enc, b_pre)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if resolve_impl(impl, x.device) is Impl.REFERENCE:
        from fastsae_kernels.threshold.reference import threshold_encode as run
    else:
        from fastsae_kernels.threshold.eager import threshold_encode as run
    return run(x, W_enc, b_enc, threshold, b_pre)


class ReLUL1(NamedTuple):
    """The loss of a ReLU SAE and what it was made of."""

    total: Tensor
    """0-dim: mse + l1_coefficient * l1, differentiable."""
    mse: Tensor
    """0-dim, detached: mean over rows of the squared error summed over D."""
    l1: Tensor
    """0-dim, detached: mean over rows of the p-norm of acts * |W_dec rows|."""
    err: Tensor
    """[..., D]: x_hat - x, detached."""
    counts: Tensor
    """[F] int64: on how many rows each latent fired."""


def relu_l1_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    l1_coefficient: float,
    lp_norm: float = 1.0,
    b_pre: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> ReLUL1:
    """Loss of a ReLU autoencoder whose code may be nearly dense, in chunks of rows.

    With acts = relu((x - b_pre) W_enc + b_enc), x_hat = acts W_dec + b_dec, n_j = |W_dec[j]|:

        total = mean_b |x_hat - x|^2 + l1_coefficient * mean_b (sum_j (acts_bj n_j)^p)^(1/p)

    The forward pass makes the gradients too, one chunk of rows under the workspace at a time;
    nothing of size [B, F] is saved. Bricken et al. 2023 (Towards Monosemanticity); weighting by
    decoder norms: Conerly et al. 2024.

    Args:
        x: [..., D], a constant.
        W_enc, b_enc, b_pre: as in `topk_encode`; W_dec [F, D], b_dec [D].
        l1_coefficient: weight of the sparsity term.
        lp_norm: p, at least 1 for a norm; smaller values are used too and must be above 0.
        impl: `auto`, `eager` or `reference`.

    Raises:
        ValueError: a shape, a device or `lp_norm` breaks the rule it names.
        TypeError: a dtype does.
    """
    _check(x, W_enc, b_enc, b_pre)
    check_float("W_dec", W_dec)
    check_shape("W_dec", W_dec, "[F, D]", (W_enc.shape[1], x.shape[-1]))
    check_shape("b_dec", b_dec, "[D]", (W_dec.shape[1],))
    check_same_device(x=x, W_dec=W_dec, b_dec=b_dec)
    if not lp_norm > 0:
        raise ValueError(f"lp_norm must be above 0, got {lp_norm}")
    if resolve_impl(impl, x.device) is Impl.REFERENCE:
        from fastsae_kernels.threshold.reference import relu_l1_loss as run
    else:
        from fastsae_kernels.threshold.eager import relu_l1_loss as run
    return ReLUL1(*run(x, W_enc, b_enc, W_dec, b_dec, l1_coefficient, lp_norm, b_pre))


def _check(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor | None) -> None:
    check_float("W_enc", W_enc)
    check_shape("W_enc", W_enc, "[D, F]", (None, None))
    check_rows("x", x, W_enc.shape[0])
    check_shape("b_enc", b_enc, "[F]", (W_enc.shape[1],))
    if b_pre is not None:
        check_shape("b_pre", b_pre, "[D]", (W_enc.shape[0],))
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre)
