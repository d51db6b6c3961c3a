from torch import Tensor

from fastsae_kernels._checks import check_encoder, check_number, check_shape, dtypes_of
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import MOST_ENTRIES, RaggedCode
from fastsae_kernels.shards import Shards, check_shards


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float,
    *,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    W_compute: Tensor | None = None,
    shards: Shards | None = None,
    impl: Impl | str = Impl.AUTO,
) -> RaggedCode:
    """The int(k B) largest of relu(((x - b_pre) W_enc + b_enc) * scale) over the whole batch.

    One threshold for all rows, k latents a row on average. The multiset of values is exact on any
    input; which of the values equal to the smallest are kept is the implementation's choice, the
    same every time (`eager`: the lowest (row, latent)). With fewer positive values the rest are
    acts of 0 at distinct pairs; NaN counts as the largest value and comes out as NaN. BatchTopK
    SAE: Bussmann et al. 2024 (arXiv 2412.06410).

    Args:
        x: [B, D] rows.
        W_enc, b_enc, b_pre, scale, W_compute: as in `topk_encode`.
        k: 0 < k <= F, need not be whole.
        shards: the holders of the other latents, and of the other rows, where W_enc is a shard or x
            a part of the batch: the threshold is that of all of them, and the code holds what is
            here, a number that the host waits for. None: all is here.
        impl: `auto`, `triton`, `eager` or `reference` (which reads W_enc itself).

    Returns:
        `RaggedCode` of B rows and int(k B) entries, a number known beforehand. Gradients flow from
        `acts` to x, W_enc, b_enc, b_pre and scale, over the active pairs only.

    Raises:
        ValueError: k, a shape or a device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_encoder(x, W_enc, b_enc, b_pre, scale, W_compute)
    d_in, d_sae = W_enc.shape
    check_shape("x", x, "[B, D]", (None, d_in))
    check_number("k", k)
    if shards is None and not 0 < k <= d_sae:
        raise ValueError(f"k must be in (0, F] with F = {d_sae}, got {k}")
    n_rows = x.shape[0] if shards is None else shards.batch_rows(x.shape[0])
    n_kept = int(k * n_rows)
    if n_kept > MOST_ENTRIES:
        raise ValueError(
            f"k must keep at most 2^31 - 1 of a batch's entries (row offsets are int32), got {k} "
            f"over {n_rows} rows"
        )
    dtypes = dtypes_of(x, W_enc, b_enc, b_pre, scale, W_compute)
    impl = resolve_impl(impl, x.device, dtypes=dtypes)
    check_shards(shards, impl)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.batch_topk.reference import batch_topk_encode as reference

        return reference(x, W_enc, b_enc, n_kept, b_pre, scale)
    from fastsae_kernels.batch_topk.function import batch_topk_encode as run

    return run(x, W_enc, b_enc, n_kept, b_pre, scale, W_compute, shards, impl)
