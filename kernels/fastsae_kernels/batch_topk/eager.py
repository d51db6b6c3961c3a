"""The n largest values of a batch, whose scores need not all be in memory at once.

Scores of whole rows are written block by block into one buffer of half the workspace. Every value
above a bound, at first 0, is a candidate; once more than 2 n of them wait they are cut to the n
largest, the least of which is the next bound: n values reach it, so none that does not exceed it is
missing. Exact on any input. Besides the workspace this takes about 60 bytes for each of those 2 n.
"""

import torch
from torch import Tensor

from fastsae_kernels._workspace import scratch, workspace_bytes
from fastsae_kernels.topk.eager import score

# Bytes a value of a block takes while it becomes a candidate and candidates are cut.
BYTES_A_CANDIDATE = 64


def select_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae, half = W_enc.shape[1], workspace_bytes() // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    n_rows = max(1, min(len(x), half // (d_sae * wide.itemsize)))
    buffer = scratch(n_rows * d_sae, x.new_empty(0, dtype=wide))
    weight = W_enc.to(x.dtype)
    largest = _Largest(n_kept, buffer)
    for start in range(0, len(x) if n_kept else 0, n_rows):
        scores = score(x[start : start + n_rows], weight, b_enc, scale, buffer)
        first = start * d_sae
        for part in scores.view(-1).split(half // BYTES_A_CANDIDATE):
            largest.add(part, first)
            first += len(part)
    acts, places = largest.finish()
    row_starts = torch.arange(len(x) + 1, device=x.device) * d_sae
    row_offsets = torch.searchsorted(places, row_starts, out_int32=True)
    return row_offsets, places.remainder_(d_sae).int(), acts


class _Largest:
    """The n largest positive values so far and their places in the batch, which ascend."""

    def __init__(self, n: int, like: Tensor) -> None:
        self.n, self.waiting = n, 0
        self.bound = like.new_zeros(())
        self.values = [like.new_empty(0)]
        self.places = [torch.empty(0, dtype=torch.int64, device=like.device)]

    def add(self, scores: Tensor, first: int) -> None:
        # "Not at or below" rather than "above": NaN passes and stays visible.
        hits = (scores <= self.bound).logical_not_().nonzero().squeeze(1)
        self.values.append(scores[hits])
        self.places.append(hits.add_(first))
        self.waiting += len(hits)
        if self.waiting > 2 * self.n:
            self._cut()

    def _cut(self) -> None:
        values, places = torch.cat(self.values), torch.cat(self.places)
        if len(values) > self.n:
            # The bits of positive floats are ordered like the floats, those of NaN above them all.
            bits = torch.int64 if values.dtype == torch.float64 else torch.int32
            keys = values.view(bits) & torch.iinfo(bits).max
            last = keys.topk(self.n, sorted=False).values.amin()
            above, tied = keys > last, keys == last
            kept = above | (tied & (tied.cumsum(0) <= self.n - above.sum()))
            values, places = values[kept], places[kept]
            self.bound = last.view(values.dtype)
        self.values, self.places, self.waiting = [values], [places], len(values)

    def finish(self) -> tuple[Tensor, Tensor]:
        """values [n], places [n]: with fewer positive values, zeros at the lowest free places."""
        self._cut()
        values, places = self.values[0], self.places[0]
        missing = self.n - len(values)
        if missing:
            taken = torch.zeros(self.n, dtype=torch.bool, device=places.device)
            taken[places[places < self.n]] = True
            free = taken.logical_not_().nonzero().squeeze(1)[:missing]
            places, order = torch.cat([places, free]).sort()
            values = torch.cat([values, values.new_zeros(missing)])[order]
        return values, places
