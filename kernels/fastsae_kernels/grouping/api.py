import torch

from fastsae_kernels._checks import check_code
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import LatentGroups, SparseCode


@torch.no_grad()
def group_by_latent(code: SparseCode, d_sae: int, *, impl: Impl | str = Impl.AUTO) -> LatentGroups:
    """Sort a code's active pairs by latent, stably; pairs whose act is 0 are left out.

    Made once a step: every weight gradient is a segment sum over these groups in a fixed order,
    and their sizes are the firing counts.

    Args:
        code: acts and indices [..., K].
        d_sae: F, the number of latents.
        impl: `auto`, `eager` or `reference`.

    Returns:
        `LatentGroups` with `pairs`, `rows` [P = B * K] and `offsets` [F + 1], int32.

    Raises:
        ValueError: shapes differ, or `indices` holds a latent outside [0, F).
        TypeError: `indices` is not int32 or int64.
    """
    check_code(code.acts, code.indices)
    if resolve_impl(impl, code.acts.device) is Impl.REFERENCE:
        from fastsae_kernels.grouping.reference import group_by_latent as run
    else:
        from fastsae_kernels.grouping.eager import group_by_latent as run
    return run(code.acts, code.indices, d_sae)
