"""Sparse codes: what an encoder hands to a decoder instead of a dense [B, F] tensor."""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_ENTRIES = 2**31 - 1
"""Of a ragged code, whose row offsets are int32."""


class LatentGroups(NamedTuple):
    """The active pairs (row, latent) of a code, sorted by latent, rows ascending within one."""

    pairs: Tensor
    """[P] int32: positions in the flattened code; the first `offsets[F]` are active."""
    rows: Tensor
    """[P] int32: the row of each pair."""
    offsets: Tensor
    """[F + 1] int32: latent j owns `pairs[offsets[j]:offsets[j + 1]]`."""

    def counts(self) -> Tensor:
        """[F] int32: on how many rows each latent fired."""
        return self.offsets.diff()


class SparseCode(NamedTuple):
    """K latents a row, by value descending, lowest index first among equals."""

    acts: Tensor
    """[..., K] fp32 (fp64 for fp64 inputs)."""
    indices: Tensor
    """[..., K] int32, distinct within a row."""
    groups: LatentGroups | None = None
    """The same pairs by latent, when the encoder made them for its backward."""

    def to_dense(self, d_sae: int) -> Tensor:
        """[..., F]: the code as every other tool expects it."""
        dense = self.acts.new_zeros(*self.acts.shape[:-1], d_sae)
        # Added, since acts of 0 may stand at a latent that is active as well.
        return dense.scatter_add(-1, self.indices.long(), self.acts)


class RaggedCode(NamedTuple):
    """Any number of latents a row: row b owns `acts[row_offsets[b]:row_offsets[b + 1]]`."""

    row_offsets: Tensor
    """[B + 1] int32."""
    indices: Tensor
    """[nnz] int32, ascending within a row."""
    acts: Tensor
    """[nnz] fp32 (fp64 for fp64 inputs)."""
    groups: LatentGroups | None = None
    """The same pairs by latent, when the encoder made them for its backward."""

    def rows(self) -> Tensor:
        """[nnz] int32: the row of each entry."""
        return entry_rows(self.row_offsets, self.indices)

    def to_dense(self, d_sae: int) -> Tensor:
        """[B, F]: the code as every other tool expects it."""
        dense = self.acts.new_zeros(self.row_offsets.numel() - 1, d_sae)
        return dense.index_put((self.rows().long(), self.indices.long()), self.acts)


def entry_rows(row_offsets: Tensor | None, indices: Tensor) -> Tensor:
    """Rows of a flattened code's entries: [B, 1] for indices [B, K], [nnz] for ragged ones."""
    n_rows = len(indices) if row_offsets is None else row_offsets.numel() - 1
    rows = torch.arange(n_rows, device=indices.device, dtype=torch.int32)
    if row_offsets is None:
        return rows.unsqueeze(1)
    return rows.repeat_interleave(row_offsets.diff(), output_size=indices.numel())


def flattened(code: SparseCode | RaggedCode) -> tuple[Tensor | None, Tensor, Tensor]:
    """row_offsets, indices, acts: None and [B, K] twice, or [B + 1] and [nnz] twice."""
    if isinstance(code, RaggedCode):
        return code.row_offsets, code.indices, code.acts
    n_slots = code.indices.shape[-1]
    return None, code.indices.reshape(-1, n_slots), code.acts.reshape(-1, n_slots)
