"""The n largest values of a batch, by the certificate of the fused top-k encode.

The same lemma with one threshold for the batch: tau is the n-th largest of all first and second
keys, so at most n // 2 groups are open, on any input, and the list of them cannot overflow. Entries
of closed groups and the members of the open ones are then cut to exactly n. The host never waits.
Temporary memory: 9 bytes for each row and group, given back before the open groups are scored;
then 4 * SIZE bytes for each of n // 2 groups, and about 60 bytes for each of the n.
"""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import (
    LOWEST,
    affine,
    column,
    group_size,
    group_top2,
    member_columns,
    score_groups,
    values_of,
)


@jit(do_not_specialize=["n_rows", "n_kept"])
def _list_groups(
    first_keys,
    first_members,
    second_keys,
    tau,
    sure_starts,
    level_starts,
    tied_starts,
    open_starts,
    level_open,
    entry_keys,
    entry_rows,
    entry_columns,
    open_rows,
    open_groups,
    n_rows,
    n_groups,
    n_kept,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0)
    at = row.to(tl.int64) * n_groups
    threshold = tl.load(tau)
    n_level_open = tl.load(level_open)
    sure_place = tl.load(sure_starts + row)
    level_place = tl.load(level_starts + row)
    n_tied = tl.load(tied_starts + row)
    open_place = tl.load(open_starts + row)
    n_sure = tl.load(sure_starts + n_rows)
    start = 0
    while start < n_groups:
        groups = start + tl.arange(0, STEP)
        inside = groups < n_groups
        first = tl.load(first_keys + at + groups, mask=inside, other=LOWEST)
        second = tl.load(second_keys + at + groups, mask=inside, other=LOWEST)
        members = tl.load(first_members + at + groups, mask=inside, other=0).to(tl.int32)
        tied = ((second == threshold) & inside).to(tl.int32)
        rank = n_tied + tl.cumsum(tied) - tied
        opened = (second > threshold) | ((tied != 0) & (rank < n_level_open))
        # Places are counted with the first keys of open groups, which then stay free.
        sure = (first > threshold).to(tl.int32)
        level = ((first == threshold) & inside).to(tl.int32)
        left = sure_place + tl.cumsum(sure) - sure
        right = n_kept - 1 - (level_place + tl.cumsum(level) - level)
        columns = column(groups, members, SIZE, COLUMNS)
        shown = tl.zeros((STEP,), tl.int32) + row
        kept = (opened == 0) & ((sure != 0) | ((level != 0) & (right >= n_sure)))
        place = tl.where(sure != 0, left, right)
        tl.store(entry_keys + place, first, mask=kept)
        tl.store(entry_rows + place, shown, mask=kept)
        tl.store(entry_columns + place, columns, mask=kept)
        slots = open_place + tl.cumsum(opened.to(tl.int32)) - opened.to(tl.int32)
        tl.store(open_rows + slots, shown, mask=opened)
        tl.store(open_groups + slots, groups, mask=opened)
        sure_place += tl.sum(sure)
        level_place += tl.sum(level)
        n_tied += tl.sum(tied)
        open_place += tl.sum(opened.to(tl.int32))
        start += STEP


def fits(n_rows: int, d_sae: int, n_kept: int) -> bool:
    """Whether there are four groups of 16 for each value that is kept, as in `topk.kernel.fits`."""
    return 0 < n_kept <= n_rows * (d_sae // 64)


def select_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, d_sae = len(x), W_enc.shape[1]
    x, (offset, factor) = x.contiguous(), affine(b_enc, scale)
    size = group_size(d_sae, -(-n_kept // n_rows))
    found = group_top2(x, W_enc, offset, size, factor, False)
    n_groups = found.first_keys.shape[1]
    tau, level_open, starts = _threshold(found.first_keys, found.second_keys, n_kept)

    most_open = max(1, n_kept // 2)
    entry_keys, entry_rows, entry_columns = entries = x.new_full(
        (3, n_kept), LOWEST.value, dtype=torch.int32
    )
    open_rows, open_groups = opened = entries.new_zeros(2, most_open)
    with device_of(x):
        _list_groups[(n_rows,)](
            *found[:3],
            tau,
            *starts,
            level_open,
            *entries,
            *opened,
            n_rows,
            n_groups,
            n_kept,
            SIZE=size,
            COLUMNS=found.layout.columns,
            STEP=min(padded(n_groups), 1024),
            num_warps=4,
        )
    layout = found.layout
    del found  # before the open groups' scores are allocated
    keys = entries.new_empty(n_kept + most_open * size)
    keys[:n_kept] = entry_keys
    scored = keys[n_kept:].view(most_open, size)
    n_open = starts[3][-1]
    score_groups(x, W_enc, offset, factor, False, layout, open_rows, open_groups, n_open, scored)

    kept = keys.topk(n_kept, sorted=False).indices
    listed = (kept - n_kept).clamp(min=0)
    group, member = listed // size, listed % size
    members = member_columns(open_groups[group], layout).gather(1, member[:, None]).squeeze(1)
    closed = kept < n_kept
    entry = kept.clamp(max=n_kept - 1)
    rows = torch.where(closed, entry_rows[entry], open_rows[group]).long()
    columns = torch.where(closed, entry_columns[entry].long(), members)
    places, order = (rows * d_sae + columns).sort()
    row_starts = torch.arange(n_rows + 1, device=x.device) * d_sae
    row_offsets = torch.searchsorted(places, row_starts, out_int32=True)
    return row_offsets, columns[order].int(), values_of(keys[kept[order]])


def _threshold(
    first: Tensor, second: Tensor, n_kept: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """tau, how many groups tied at tau to open, and where each row's groups of a kind start.

    The n largest of both kinds of key are among the n largest of either, so that three selections
    find tau and the keys need not be joined.
    """
    n_first, n_second = min(n_kept, first.numel()), min(n_kept, second.numel())
    best = [
        first.view(-1).topk(n_first, sorted=False).values,
        second.view(-1).topk(n_second, sorted=False).values,
    ]
    tau = torch.cat(best).topk(n_kept, sorted=False).values.amin()
    above = (first > tau).sum(1), (second > tau).sum(1)
    level, tied = (first == tau).sum(1), (second == tau).sum(1)
    level_open = (n_kept - above[0].sum() - above[1].sum() - level.sum()).clamp(min=0)
    n_tied_before = torch.nn.functional.pad(tied.cumsum(0), (1, 0))
    opened_by_ties = n_tied_before.clamp(max=level_open).diff()
    counts = (above[0], level, tied, above[1] + opened_by_ties)
    starts = tuple(torch.nn.functional.pad(c.cumsum(0), (1, 0)).int() for c in counts)
    return tau, level_open.int(), starts


def specs() -> Iterator[Spec]:
    names = ("tau", "sure_starts", "level_starts", "tied_starts", "open_starts", "level_open")
    names += ("entry_keys", "entry_rows", "entry_columns", "open_rows", "open_groups")
    pointers = {"first_keys": "*i32", "first_members": "*i8", "second_keys": "*i32"}
    yield Spec(
        "batch_topk.list_groups",
        _list_groups,
        {
            **pointers,
            **dict.fromkeys(names, "*i32"),
            **dict.fromkeys(("n_rows", "n_groups", "n_kept"), "i32"),
        },
        {"SIZE": 64, "COLUMNS": 256, "STEP": 1024},
    )
