from torch import Tensor

from fastsae_kernels._checks import check_code, check_decoder, check_same_device
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import RaggedCode, SparseCode


def sparse_decode(
    code: SparseCode | RaggedCode,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """x_hat[b] = sum_k acts[b, k] W_dec[indices[b, k]] + b_dec, by gathering the active rows.

    Equals `code.to_dense(F) @ W_dec + b_dec` without the dense [B, F] code. Differentiable in
    `acts`, `W_dec` and `b_dec`. With several decoder targets, W_dec is [F, T, D].

    Args:
        code: acts and indices [..., K], or a ragged code of B rows (then x_hat is [B, D]).
        W_dec: [F, D] or [F, T, D], one row a latent; `triton` wants a row's elements side by side.
        b_dec: [D] or [T, D], or None.
        impl: `auto`, `triton`, `eager` or `reference`.

    Returns:
        x_hat [..., D] or [..., T, D], in the wider of the dtypes of `acts` and `W_dec`.

    Raises:
        ValueError: a shape or device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_decoder(W_dec, b_dec)
    check_code(code, W_dec.shape[0])
    check_same_device(acts=code.acts, W_dec=W_dec, b_dec=b_dec)
    impl = resolve_impl(impl, W_dec.device, dtypes=(code.acts.dtype, W_dec.dtype))
    if impl is Impl.REFERENCE:
        from fastsae_kernels.decode.reference import sparse_decode

        return sparse_decode(code, W_dec, b_dec)
    from fastsae_kernels.decode.function import sparse_decode

    return sparse_decode(code, W_dec, b_dec, impl)
