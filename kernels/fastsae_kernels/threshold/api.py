from typing import NamedTuple

from torch import Tensor

from fastsae_kernels._checks import (
    check_encoder,
    check_float,
    check_number,
    check_same_device,
    check_shape,
    dtypes_of,
)
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import RaggedCode

# Dense products by chunks of rows: one implementation on every device.
RELU_L1_IMPLS = (Impl.EAGER, Impl.REFERENCE)


class JumpReLUCode(NamedTuple):
    """A JumpReLU code for training, and how many latents are active."""

    code: RaggedCode
    """The active pairs, and with acts of 0 the pairs of the band below their threshold."""
    l0: Tensor
    """[B]: active latents of each row, in the dtype of the acts; its gradient is the threshold's
    straight-through one."""


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


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    threshold: float | Tensor = 0.0,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    W_compute: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> RaggedCode:
    """Every z = ((x - b_pre) W_enc + b_enc) * scale above its latent's threshold, row by row.

    A ReLU code for threshold 0, a JumpReLU code for one threshold a latent. NaN counts as above.
    The number of entries is only known once they are counted: on a GPU the host waits for the
    device, `eager` once a block of rows. A code that is nearly dense costs more than the dense
    tensor; a ReLU SAE is trained through `relu_l1_loss`.

    Args:
        x: [B, D] rows.
        W_enc, b_enc, b_pre, scale, W_compute: as in `topk_encode`.
        threshold: >= 0, one number (a float or 0-dim) or [F]: the largest value that is left out.
            A constant here, compared in the dtype of the acts, and as a tensor not checked;
            `jumprelu_encode` trains it.
        impl: `auto`, `triton`, `eager` or `reference` (which reads W_enc itself).

    Returns:
        `RaggedCode` of B rows. Gradients flow from `acts` to x, W_enc, b_enc, b_pre and scale.

    Raises:
        ValueError: a shape, a device or the threshold breaks the rule it names.
        TypeError: a dtype does.
    """
    check_encoder(x, W_enc, b_enc, b_pre, scale, W_compute)
    check_shape("x", x, "[B, D]", (None, W_enc.shape[0]))
    if isinstance(threshold, Tensor):
        check_float("threshold", threshold)
        if threshold.ndim != 0:
            check_shape("threshold", threshold, "[F]", (W_enc.shape[1],))
        check_same_device(x=x, threshold=threshold)
    else:
        check_number("threshold", threshold)
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
    dtypes = dtypes_of(x, W_enc, b_enc, b_pre, scale, W_compute)
    impl = resolve_impl(impl, x.device, dtypes=dtypes)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.threshold.reference import threshold_encode as reference

        return reference(x, W_enc, b_enc, threshold, b_pre, scale)
    from fastsae_kernels.threshold.function import threshold_encode as run

    return run(x, W_enc, b_enc, threshold, b_pre, scale, W_compute, impl)


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    *,
    b_pre: Tensor | None = None,
    W_compute: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> JumpReLUCode:
    """acts = z H(z - threshold) with z = (x - b_pre) W_enc + b_enc, for training the threshold.

    With H the step function and l0_b = sum_j H(z_bj - threshold_j). The step's derivative is taken
    over a band around it: where |z - threshold| < bandwidth / 2,

        d acts / d threshold = -threshold / bandwidth        d l0 / d threshold = -1 / bandwidth

    and 0 elsewhere; d acts / d z = H and d l0 / d z = 0. Rajamanoharan et al. 2024 (arXiv
    2407.14435), as SAELens 6 has it. The code holds the active pairs and those of the band, which
    is what the gradients need; a loss is written as `mse + l0_coefficient * l0.mean()`. Counting
    waits for the device as in `threshold_encode`, which is the encode for inference.

    Args:
        x: [B, D] rows.
        W_enc, b_enc, b_pre, W_compute: as in `topk_encode`.
        threshold: [F] >= 0, which is not checked; compared in the dtype of the acts.
        bandwidth: width of the band, above 0.
        impl: `auto`, `triton`, `eager` or `reference` (which reads W_enc itself).

    Returns:
        `JumpReLUCode(code, l0)`. Gradients flow from `code.acts` to x, W_enc, b_enc and b_pre
        over the active pairs, and from `code.acts` and `l0` to `threshold` over the band's.
        `code.groups` are of the active pairs.

    Raises:
        ValueError: a shape, a device or the bandwidth breaks the rule it names.
        TypeError: a dtype does.
    """
    check_encoder(x, W_enc, b_enc, b_pre, W_compute=W_compute)
    check_shape("x", x, "[B, D]", (None, W_enc.shape[0]))
    check_float("threshold", threshold)
    check_shape("threshold", threshold, "[F]", (W_enc.shape[1],))
    check_same_device(x=x, threshold=threshold)
    check_number("bandwidth", bandwidth)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0, got {bandwidth}")
    dtypes = dtypes_of(x, W_enc, b_enc, b_pre, W_compute)
    impl = resolve_impl(impl, x.device, dtypes=dtypes)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.threshold.reference import jumprelu_encode as reference

        return JumpReLUCode(*reference(x, W_enc, b_enc, threshold, bandwidth, b_pre))
    from fastsae_kernels.threshold.function import jumprelu_encode as run

    return JumpReLUCode(*run(x, W_enc, b_enc, threshold, bandwidth, b_pre, W_compute, impl))


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
    check_encoder(x, W_enc, b_enc, b_pre)
    check_float("W_dec", W_dec)
    check_shape("W_dec", W_dec, "[F, D]", (W_enc.shape[1], x.shape[-1]))
    check_float("b_dec", b_dec)
    check_shape("b_dec", b_dec, "[D]", (W_dec.shape[1],))
    check_same_device(x=x, W_dec=W_dec, b_dec=b_dec)
    if not lp_norm > 0:
        raise ValueError(f"lp_norm must be above 0, got {lp_norm}")
    if resolve_impl(impl, x.device, RELU_L1_IMPLS) is Impl.REFERENCE:
        from fastsae_kernels.threshold.reference import relu_l1_loss as run
    else:
        from fastsae_kernels.threshold.function import relu_l1_loss as run
    return ReLUL1(*run(x, W_enc, b_enc, W_dec, b_dec, l1_coefficient, lp_norm, b_pre))
