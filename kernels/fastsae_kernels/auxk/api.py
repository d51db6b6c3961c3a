import torch
from torch import Tensor

from fastsae_kernels._checks import (
    check_encoder,
    check_float,
    check_same_device,
    check_shape,
    dtypes_of,
)
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.shards import Shards, check_shards


def aux_topk(
    x: Tensor,
    err: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    *,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    absolute: bool = False,
    shards: Shards | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """AuxK loss: the dead latents' best reconstruction of what the live ones left over.

    With h = (x - b_pre) W_enc + b_enc over the dead latents only, k_aux = min(D // 2, n_dead), and
    S_b the k_aux latents with the largest h * scale (signed, no ReLU):

        e_hat[b] = sum over j in S_b of h[b, j] W_dec[j]
        aux      = min(n_dead / (D // 2), 1) * mean_b |e_hat[b] + err[b]|^2

    Zero without dead latents. Gao et al. 2024 (arXiv 2406.04093), appendix A.2, as SAELens 6
    weighs it. `scale` ranks the latents and nothing else: with decoder norms, the scaled acts
    and the decoder divided by its norms, SAELens's form, have the same value and gradient.

    Args:
        x: [..., D].
        err: [..., D] x_hat - x, what the live latents left over, a constant (D is W_dec's).
        dead: [F] bool.
        absolute: pick the latents with the largest |h| * scale instead, as AbsTopK does.
        W_enc, b_enc, W_dec, b_pre, scale: as in `topk_encode` and `sparse_decode`.
        shards: the holders of the other latents where W_enc and W_dec are a shard: n_dead and S_b
            are those of all shards, at least one of which has a dead latent. None: all is here.
        impl: `auto`, `triton`, `eager` or `reference`.

    Returns:
        0-dim loss; gradients reach W_enc, b_enc, b_pre and W_dec.

    Raises:
        ValueError: a shape or a device breaks the rule it names.
        TypeError: `dead` is not bool, or a dtype is not floating.
    """
    check_encoder(x, W_enc, b_enc, b_pre, scale)
    d_sae = W_enc.shape[1]
    check_float("W_dec", W_dec)
    check_shape("W_dec", W_dec, "[F, D]", (d_sae, None))
    check_float("err", err)
    check_shape("err", err, "[..., D] with x's leading shape", (*x.shape[:-1], W_dec.shape[1]))
    check_shape("dead", dead, "[F]", (d_sae,))
    if dead.dtype != torch.bool:
        raise TypeError(f"dead must be bool, got {dead.dtype}")
    check_same_device(x=x, err=err, dead=dead, W_dec=W_dec)
    dtypes = dtypes_of(x, err, W_enc, b_enc, W_dec, b_pre, scale)
    impl = resolve_impl(impl, x.device, dtypes=dtypes)
    check_shards(shards, impl)
    if impl is Impl.REFERENCE:
        from fastsae_kernels.auxk.reference import aux_topk as reference

        return reference(x, err, dead, W_enc, b_enc, W_dec, b_pre, scale, absolute)
    from fastsae_kernels.auxk.function import aux_topk as run

    return run(x, err, dead, W_enc, b_enc, W_dec, b_pre, scale, absolute, shards, impl)
