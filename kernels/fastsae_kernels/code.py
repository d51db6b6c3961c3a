"""Sparse codes: what an encoder hands to a decoder instead of a dense [B, F] tensor."""

from typing import NamedTuple

import torch
from torch import Tensor


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
        return dense.scatter(-1, self.indices.long(), self.acts)


class RaggedCode(NamedTuple):
    """Any number of latents a row: row b owns `acts[row_offsets[b]:row_offsets[b + 1]]`."""

    row_offsets: Tensor
    """[B + 1] int32."""
    indices: Tensor
    """[nnz] int32, ascending within a row."""
    acts: Tensor
    """[nnz] fp32 (fp64 for fp64 inputs), none of them 0."""

    def rows(self) -> Tensor:
        """[nnz] int32: the row of each entry."""
        n_rows = self.row_offsets.numel() - 1
        ids = torch.arange(n_rows, device=self.acts.device, dtype=torch.int32)
        return ids.repeat_interleave(self.row_offsets.diff())

    def to_dense(self, d_sae: int) -> Tensor:
        """[B, F]: the code as every other tool expects it."""
        dense = self.acts.new_zeros(self.row_offsets.numel() - 1, d_sae)
        return dense.index_put((self.rows().long(), self.indices.long()), self.acts)
