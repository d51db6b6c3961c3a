from torch import Tensor

from fastsae_kernels._checks import check_encoder, dtypes_of
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import SparseCode
from fastsae_kernels.shards import Shards, check_shards


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    W_compute: Tensor | None = None,
    shards: Shards | None = None,
    impl: Impl | str = Impl.AUTO,
) -> SparseCode:
    """The k largest of relu(((x - b_pre) W_enc + b_enc) * scale), row by row.

    Equals `torch.topk` of that dense [B, F] tensor: the multiset of values is exact on any input.
    Rows with fewer than k positive values are filled with acts of 0 at distinct latents; NaN counts
    as the largest value and comes out as NaN. TopK SAE: Gao et al. 2024 (arXiv 2406.04093), 2.3.

    Args:
        x: [..., D] rows.
        W_enc: [D, F]; fastest with one latent contiguous (strides (1, D)).
        b_enc: [F].
        k: 1 <= k <= F.
        b_pre: [D], subtracted from x, or None.
        scale: [F] >= 0, multiplies the pre-activations (decoder norms), or None.
        W_compute: a copy of W_enc in a cheaper dtype to read instead; gradients go to W_enc. On a
            GPU the weight that is read is rounded to x's dtype where it has another.
        shards: the holders of the other latents where W_enc is a shard: k counts over all shards,
            the code holds this shard's latents among a row's k largest, and acts of 0 in the slots
            of others. None: W_enc is whole.
        impl: `auto`, `triton`, `eager` or `reference` (which reads W_enc itself). Few latents or a
            large k, fewer than 4 k groups of 16 latents, take `eager` on any device: where more
            than one latent in 64 is kept, too many would be scored twice.

    Returns:
        `SparseCode`: acts [..., k] in fp32 (fp64 for fp64 inputs) by value descending, lowest index
        first among equals; indices [..., k] int32. Gradients flow from `acts` to x, W_enc, b_enc,
        b_pre and scale, over the active pairs only.

    Raises:
        ValueError: k, a shape or a device breaks the rule it names.
        TypeError: a dtype does.
    """
    check_encoder(x, W_enc, b_enc, b_pre, scale, W_compute)
    d_sae = W_enc.shape[1]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    if shards is None and not 1 <= k <= d_sae:
        raise ValueError(f"k must be in [1, F] with F = {d_sae}, got {k}")
    dtypes = dtypes_of(x, W_enc, b_enc, b_pre, scale, W_compute)
    impl = resolve_impl(impl, x.device, dtypes=dtypes)
    check_shards(shards, impl)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.topk.reference import topk_encode as reference

        return reference(x, W_enc, b_enc, k, b_pre, scale)
    from fastsae_kernels.topk.function import topk_encode as run

    return run(x, W_enc, b_enc, k, b_pre, scale, W_compute, shards, impl)
