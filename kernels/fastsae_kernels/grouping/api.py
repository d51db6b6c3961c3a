import torch

from fastsae_kernels._checks import check_code, check_d_sae
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels.code import LatentGroups, RaggedCode, SparseCode, flattened


@torch.no_grad()
def group_by_latent(
    code: SparseCode | RaggedCode, d_sae: int, *, impl: Impl | str = Impl.AUTO
) -> LatentGroups:
    """Sort a code's active pairs by latent, stably; pairs whose act is 0 are left out.

    Made once a step: every weight gradient is a segment sum over these groups in a fixed order,
    and their sizes are the firing counts.

    Args:
        code: acts and indices [..., K], or a ragged code of B rows.
        d_sae: F, the number of latents.
        impl: `triton` and `eager` are one here: torch's stable radix sort of the int32 latents.

    Returns:
        `LatentGroups` with `pairs` and `rows` [P], P the number of the code's entries, and
        `offsets` [F + 1], all int32.

    Raises:
        ValueError: shapes or devices differ, `indices` holds a latent outside [0, F), or
            `row_offsets` does not ascend from 0 to the number of entries (on a GPU these two are
            only looked at inside `index_checks`).
        TypeError: `acts` is not floating, or `indices` or `row_offsets` not int32 or int64,
            or `d_sae` is no int.
    """
    check_d_sae(d_sae)
    check_code(code, d_sae)
    if resolve_impl(impl, code.acts.device) is Impl.REFERENCE:
        from fastsae_kernels.grouping.reference import group_by_latent as run
    else:
        from fastsae_kernels.grouping.eager import group_by_latent as run
    return run(*flattened(code), d_sae)
