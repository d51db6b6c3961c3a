"""Exact top-k of scores that need not all be in memory at once.

Blocks of scores as large as half the workspace are written into the same buffer. The k-th largest
maximum over groups of 32 columns is a value that k scores reach, so only groups whose maximum does
can hold a winner: on real inputs about k of them. Their few values are merged into the k best so
far, whose last is the bound for the next block. Whatever the input, a block with too many such
groups is merged by `torch.topk` instead, so memory stays within the workspace.
"""

import torch
from torch import Tensor

from fastsae_kernels._workspace import scratch, workspace_bytes

GROUP = 32
MAX_ROWS = 2048
MIN_ROWS = 512  # a product over fewer rows is slower
KEEPS_FP32_SUMS = torch.__version__ >= (2, 8)  # pyright: ignore[reportOperatorIssue]
"""Whether a GPU's half-precision product can be had as it was summed, unrounded."""


def select_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    floor = -torch.inf if signed else 0.0
    wide = torch.promote_types(x.dtype, torch.float32)
    acts = torch.empty(x.shape[0], k, dtype=wide, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    n_rows, n_columns = _block_shape(len(x), W_enc.shape[1], k, wide.itemsize)
    buffer = scratch(n_rows * n_columns, acts)
    for start in range(0, x.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        best = _Best(acts[rows], floor)
        for columns in _column_blocks(W_enc.shape[1], n_columns):
            part = None if scale is None else scale[columns]
            scores = score(x[rows], W_enc[:, columns], b_enc[columns], part, buffer)
            best.merge(scores, columns.start)
        acts[rows], indices[rows] = best.finish(W_enc.shape[1])
    return acts, indices


def _block_shape(n_rows: int, d_sae: int, k: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a block; half the workspace is left for what is found in it.

    With 4 k groups to a block only about a quarter of them can hold one of its k best.
    """
    values = workspace_bytes() // 2 // itemsize
    rows = min(n_rows, MAX_ROWS, max(MIN_ROWS, values // (4 * k * GROUP)))
    rows = max(1, min(rows, values // max(GROUP, 4 * k)))
    columns = values // rows // GROUP * GROUP
    return rows, max(GROUP, min(columns, -(-d_sae // GROUP) * GROUP))


def _column_blocks(d_sae: int, n_columns: int) -> list[slice]:
    """Whole groups in blocks of `n_columns`, then the columns that fill no group."""
    whole = d_sae // GROUP * GROUP
    edges = [*range(0, whole, n_columns), whole, d_sae]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def score(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, buffer: Tensor) -> Tensor:
    """[B, C]: (x W_enc + b_enc) * scale, written into `buffer`."""
    out = buffer[: x.shape[0] * W_enc.shape[1]].view(x.shape[0], W_enc.shape[1])
    if x.dtype == out.dtype:
        torch.mm(x, W_enc.to(x.dtype), out=out)
    elif x.is_cuda and KEEPS_FP32_SUMS and out.dtype == torch.float32:
        torch.mm(x, W_enc.to(x.dtype), out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(x, W_enc.to(x.dtype)))
    # The bias comes after the product: `addmm` would first fill the block with it.
    b_enc = b_enc.to(out.dtype)
    if scale is None:
        return out.add_(b_enc)
    scale = scale.to(out.dtype)
    return torch.addcmul(b_enc * scale, out, scale, out=out)


class _Best:
    """The k best values of each row so far, and the value that a newcomer must exceed."""

    def __init__(self, acts: Tensor, floor: float) -> None:
        self.k, self.floor = acts.shape[1], floor
        self.acts = torch.full_like(acts, floor)
        self.indices = torch.zeros_like(acts, dtype=torch.int32)
        self.bound = acts.new_full((len(acts),), floor)

    def merge(self, scores: Tensor, first: int) -> None:
        n_rows, n_columns = scores.shape
        if n_columns % GROUP:
            return self._merge_block(scores, first)
        groups = scores.view(n_rows, -1, GROUP)
        maxima = groups.amax(2)
        if first == 0 and maxima.shape[1] >= self.k:
            # The k-th largest maximum is a value of the row that k values reach.
            reached = maxima.topk(self.k, dim=1).values[:, -1]
            self.bound = torch.nextafter(reached, reached.new_tensor(-torch.inf)).clamp_min_(
                self.floor
            )
        # "Not below or equal" rather than "above": NaN passes and stays visible.
        open_groups = (maxima <= self.bound[:, None]).logical_not_().view(-1).nonzero().squeeze(1)
        if open_groups.numel() > maxima.numel() // 2:
            return self._merge_block(scores, first)
        found = groups.view(-1, GROUP).index_select(0, open_groups)
        group_rows = open_groups // maxima.shape[1]
        beats = (found <= self.bound[group_rows][:, None]).logical_not_()
        hits = beats.view(-1).nonzero().squeeze(1)
        values = found.view(-1)[hits]
        hit_groups = hits // GROUP
        rows = group_rows[hit_groups]
        columns = open_groups[hit_groups] % maxima.shape[1] * GROUP + hits % GROUP + first
        counts = rows.bincount(minlength=n_rows)
        width = int(counts.max())
        if width > max(8 * self.k, n_columns // 8):
            return self._merge_block(scores, first)
        # Row by row: each newcomer's place behind the k best, where padding never wins.
        slot = torch.arange(hits.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        place = rows * width + slot
        new_acts = values.new_full((n_rows, width), -torch.inf)
        new_acts.view(-1)[place] = values
        new_indices = self.indices.new_zeros(n_rows, width)
        new_indices.view(-1)[place] = columns.int()
        self._keep(new_acts, new_indices)

    def _merge_block(self, scores: Tensor, first: int) -> None:
        values, columns = scores.topk(min(self.k, scores.shape[1]), dim=1)
        self._keep(values, (columns + first).int())

    def _keep(self, new_acts: Tensor, new_indices: Tensor) -> None:
        acts = torch.cat([self.acts, new_acts.clamp_min_(self.floor)], dim=1)
        self.acts, order = acts.topk(self.k, dim=1)
        self.indices = torch.cat([self.indices, new_indices], dim=1).gather(1, order)
        self.bound = self.acts[:, -1].contiguous()

    def finish(self, d_sae: int) -> tuple[Tensor, Tensor]:
        acts, indices = self.acts, self.indices
        if self.floor == 0 and bool((acts[:, -1] == 0).any()):
            indices = _fill_padding(acts, indices, d_sae)
        if self.k > 1 and bool((acts[:, 1:] == acts[:, :-1]).any()):
            indices, order = indices.sort(dim=1)
            acts = acts.gather(1, order)
            acts, order = acts.sort(dim=1, descending=True, stable=True)
            indices = indices.gather(1, order)
        return acts, indices


def _fill_padding(acts: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """Give the acts of 0 the lowest latents that are not active in their row."""
    short = (acts[:, -1] == 0).nonzero().squeeze(1)
    k = acts.shape[1]
    out = indices.clone()
    for rows in short.split(max(1, workspace_bytes() // (32 * k))):
        n_candidates = min(2 * k, d_sae)
        active = acts[rows] != 0
        taken = torch.zeros(len(rows), n_candidates + 1, dtype=torch.bool, device=acts.device)
        spill = torch.where(active, indices[rows].long(), n_candidates).clamp_max(n_candidates)
        taken.scatter_(1, spill, True)
        free = taken[:, :n_candidates].to(torch.int8).argsort(dim=1, stable=True)
        rank = (~active).cumsum(1) - 1
        picked = free.gather(1, rank.clamp_min(0)).int()
        out[rows] = torch.where(active, indices[rows], picked)
    return out
