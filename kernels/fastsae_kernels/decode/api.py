from torch import Tensor

from fastsae_kernels._checks import (
    check_code,
    check_float,
    check_rows,
    check_same_device,
    check_shape,
)
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
    `acts`, `W_dec` and `b_dec` for a `SparseCode`; a `RaggedCode` is decoded without gradient.

    Args:
        code: acts and indices [..., K], or a ragged code of B rows.
        W_dec: [F, D], one row a latent.
        b_dec: [D] or None.
        impl: `auto`, `eager` or `reference`.

    Returns:
        x_hat [..., D], in the wider of the dtypes of `acts` and `W_dec`.

    Raises:
        ValueError: a shape or device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_shape("W_dec", W_dec, "[F, D]", (None, None))
    check_float("W_dec", W_dec)
    if b_dec is not None:
        check_rows("b_dec", b_dec, W_dec.shape[1])
    check_same_device(acts=code.acts, indices=code.indices, W_dec=W_dec, b_dec=b_dec)
    reference = resolve_impl(impl, W_dec.device) is Impl.REFERENCE
    if isinstance(code, RaggedCode):
        if reference:
            from fastsae_kernels.decode.reference import ragged_decode
        else:
            from fastsae_kernels.decode.eager import ragged_decode
        return ragged_decode(code, W_dec, b_dec)
    check_code(code.acts, code.indices)
    if reference:
        from fastsae_kernels.decode.reference import sparse_decode as run
    else:
        from fastsae_kernels.decode.eager import sparse_decode as run
    return run(code, W_dec, b_dec)
