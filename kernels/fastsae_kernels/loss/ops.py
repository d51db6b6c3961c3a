"""Decode, error and losses of each row in one pass over its active rows, as a registered op."""

import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels.decode.ops import gather_sum, pair_dots
from fastsae_kernels.loss.eager import l1_rows
from fastsae_kernels.shards import Shards


def mse_l1_rows(
    x: Tensor,
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    needs_dots: bool,
    impl: Impl,
    shards: Shards | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_mse [B], row_l1 [B], err [B, D], dots like `acts`, in the dtype of `acts`.

    err = x_hat - x, row_mse = |err|^2, row_l1 = sum |acts| * l1_weight[indices], and
    dots = err . W_dec[indices], the gradient of row_mse / 2 by each act (empty if not needed).
    `indices` and `acts` are [B, K], or [nnz] with `row_offsets` [B + 1]. With `shards`, x_hat and
    row_l1 are sums over them, and `dots` are of this one's latents.
    """
    if shards is None:
        return _mse_l1_rows(
            x, row_offsets, indices, acts, W_dec, b_dec, l1_weight, needs_dots, impl.value
        )
    err = shards.total(gather_sum(row_offsets, indices, acts, W_dec, impl)).add_(b_dec).sub_(x)
    dots = acts.new_empty(0)
    if needs_dots:
        dots = pair_dots(row_offsets, indices, err, W_dec, impl).to(acts.dtype)
    row_l1 = shards.total(l1_rows(row_offsets, indices, acts, l1_weight))
    return torch.linalg.vector_norm(err, dim=1).square(), row_l1, err, dots


@torch.library.custom_op("fastsae::mse_l1_rows", mutates_args=())
def _mse_l1_rows(
    x: Tensor,
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    needs_dots: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == Impl.TRITON:
        from fastsae_kernels.loss.kernel import mse_l1_rows as run
    else:
        from fastsae_kernels.loss.eager import mse_l1_rows as run
    row_mse, row_l1, err, dots = run(
        x, row_offsets, indices, acts, W_dec, b_dec, l1_weight, needs_dots
    )
    return tuple(t.to(acts.dtype) for t in (row_mse, row_l1, err, dots))  # pyright: ignore[reportReturnType]


@_mse_l1_rows.register_fake
def _(
    x: Tensor,
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    needs_dots: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = acts.new_empty(x.shape[0])
    dots = torch.empty_like(acts) if needs_dots else acts.new_empty(0)
    return rows, torch.empty_like(rows), acts.new_empty(x.shape), dots
