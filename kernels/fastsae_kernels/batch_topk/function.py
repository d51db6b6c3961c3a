import torch
from torch import Tensor

from fastsae_kernels._dispatch import Impl
from fastsae_kernels._encoder_pairs import Encoder, centred, product_dtype, with_gradients
from fastsae_kernels.batch_topk.ops import select_batch_topk
from fastsae_kernels.code import RaggedCode, entry_rows
from fastsae_kernels.shards import Shards, all_that_may_win


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    n_kept: int,
    b_pre: Tensor | None,
    scale: Tensor | None,
    W_compute: Tensor | None,
    shards: Shards | None,
    impl: Impl,
) -> RaggedCode:
    encoder = Encoder(x, W_enc, b_enc, b_pre, scale)
    with torch.no_grad():
        rows = centred(x, b_pre, product_dtype(x))
        weight = W_enc if W_compute is None else W_compute
        if shards is None:
            found = select_batch_topk(rows, weight, b_enc, n_kept, scale, impl)
        else:
            found = _winners(
                *all_that_may_win(
                    lambda n: select_batch_topk(rows, weight, b_enc, n, scale, impl),
                    n_kept,
                    len(x) * len(b_enc),
                ),
                n_kept,
                shards,
            )
    row_offsets, indices, acts = found
    acts, groups = with_gradients(*found, acts, encoder, W_compute, rows, impl)
    return RaggedCode(row_offsets, indices, acts, groups)


def _winners(
    row_offsets: Tensor, indices: Tensor, acts: Tensor, n_kept: int, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a selection that are among the largest of all shards."""
    rows = entry_rows(row_offsets, indices)
    kept = shards.keep_batch_topk(acts, rows.long(), indices.long(), n_kept)
    before = torch.cat([kept.new_zeros(1), kept]).cumsum(0, dtype=torch.int32)
    places = kept.nonzero().squeeze(1)
    return before.index_select(0, row_offsets), indices[places], acts[places]
