"""The n largest values of a batch, by the certificate of the fused top-k encode.

The same lemma with one threshold for the batch: tau is the n-th largest of all first and second
keys, so fewer than n groups are open, on any input, and the list of them cannot overflow. Entries
of closed groups and the members of the open ones are then cut to exactly n. The host never waits.
Temporary memory: 15 bytes for each row and group, given back before the open groups are scored;
then 4 * SIZE bytes for each of n groups, and about 120 bytes for each of the n.
"""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import Groups, affine, group_top2
from fastsae_kernels.topk.keys import (
    LOWEST,
    bound_of,
    column,
    columns_of,
    first_member,
    group_size,
    second_member,
    values_of,
)
from fastsae_kernels.topk.scores import score_groups


@jit(do_not_specialize=["n_rows", "n_kept"])
def _list_groups(
    first_keys,
    second_keys,
    rest,
    tau,
    sure_starts,
    level_starts,
    open_starts,
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
    sure_place = tl.load(sure_starts + row)
    level_place = tl.load(level_starts + row)
    open_place = tl.load(open_starts + row)
    n_sure = tl.load(sure_starts + n_rows)
    shown = tl.zeros((STEP,), tl.int32) + row
    start = 0
    while start < n_groups:
        groups = start + tl.arange(0, STEP)
        inside = groups < n_groups
        first = tl.load(first_keys + at + groups, mask=inside, other=LOWEST)
        second = tl.load(second_keys + at + groups, mask=inside, other=LOWEST)
        others = tl.load(rest + at + groups, mask=inside, other=LOWEST)
        opened = ((first > threshold) & (bound_of(others) > threshold)).to(tl.int32)
        # Places are counted with the keys of open groups, which then stay free.
        sure1, sure2 = (first > threshold).to(tl.int32), (second > threshold).to(tl.int32)
        level1 = ((first == threshold) & inside).to(tl.int32)
        level2 = ((second == threshold) & inside).to(tl.int32)
        left = sure_place + tl.cumsum(sure1 + sure2) - sure1 - sure2
        right = n_kept - 1 - (level_place + tl.cumsum(level1 + level2) - level1 - level2)
        place1 = tl.where(sure1 != 0, left, right)
        place2 = tl.where(sure2 != 0, left + sure1, right - level1)
        kept1 = (opened == 0) & ((sure1 != 0) | ((level1 != 0) & (place1 >= n_sure)))
        kept2 = (opened == 0) & ((sure2 != 0) | ((level2 != 0) & (place2 >= n_sure)))
        tl.store(entry_keys + place1, first, mask=kept1)
        tl.store(entry_rows + place1, shown, mask=kept1)
        columns1 = column(groups, first_member(others), SIZE, COLUMNS)
        tl.store(entry_columns + place1, columns1, mask=kept1)
        tl.store(entry_keys + place2, second, mask=kept2)
        tl.store(entry_rows + place2, shown, mask=kept2)
        columns2 = column(groups, second_member(others), SIZE, COLUMNS)
        tl.store(entry_columns + place2, columns2, mask=kept2)
        slots = open_place + tl.cumsum(opened) - opened
        tl.store(open_rows + slots, shown, mask=opened != 0)
        tl.store(open_groups + slots, groups, mask=opened != 0)
        sure_place += tl.sum(sure1 + sure2)
        level_place += tl.sum(level1 + level2)
        open_place += tl.sum(opened)
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
    tau, starts = _threshold(found, n_kept)

    entry_keys, entry_rows, entry_columns = entries = x.new_full(
        (3, n_kept), LOWEST.value, dtype=torch.int32
    )
    open_rows, open_groups = opened = entries.new_zeros(2, n_kept)
    with device_of(x):
        _list_groups[(n_rows,)](
            *found[:3],
            tau,
            *starts,
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
    keys = entries.new_full((n_kept * (1 + size),), LOWEST.value)
    keys[:n_kept] = entry_keys
    scored = keys[n_kept:].view(n_kept, size)
    n_open = starts[2][-1]
    score_groups(x, W_enc, offset, factor, False, layout, open_rows, open_groups, n_open, scored)

    kept = keys.topk(n_kept, sorted=False).indices
    listed = (kept - n_kept).clamp(min=0)
    group, member = listed // size, listed % size
    members = columns_of(open_groups[group].long(), member, layout)
    closed = kept < n_kept
    entry = kept.clamp(max=n_kept - 1)
    rows = torch.where(closed, entry_rows[entry], open_rows[group]).long()
    columns = torch.where(closed, entry_columns[entry].long(), members)
    places, order = (rows * d_sae + columns).sort()
    row_starts = torch.arange(n_rows + 1, device=x.device) * d_sae
    row_offsets = torch.searchsorted(places, row_starts, out_int32=True)
    return row_offsets, columns[order].int(), values_of(keys[kept[order]])


def _threshold(found: Groups, n_kept: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """tau, and where each row's sure entries, entries equal to tau and open groups start.

    The n largest of both kinds of key are among the n largest of either, so that three selections
    find tau and the keys need not be joined.
    """
    first, second = found.first_keys, found.second_keys
    best = [keys.view(-1).topk(min(n_kept, keys.numel()), sorted=False).values
            for keys in (first, second)]  # fmt: skip
    tau = torch.cat(best).topk(n_kept, sorted=False).values.amin()
    # bound_of(rest) > tau, without a copy of rest: only its upper bits can exceed those of tau.
    opened = (first > tau) & (found.rest > (tau | 0xFFFF))
    sure = (first > tau).sum(1) + (second > tau).sum(1)
    level = (first == tau).sum(1) + (second == tau).sum(1)
    return tau, tuple(_starts(counts, n_kept) for counts in (sure, level, opened.sum(1)))


def _starts(counts: Tensor, n_kept: int) -> Tensor:
    """int32: where each row's places start. From n_kept on there are none: ties may exceed 2^31."""
    return torch.nn.functional.pad(counts.cumsum(0).clamp_max(n_kept), (1, 0)).int()


def specs() -> Iterator[Spec]:
    keys = ["first_keys", "second_keys", "rest", "tau", "entry_keys"]
    places = ["sure_starts", "level_starts", "open_starts"]
    places += ["entry_rows", "entry_columns", "open_rows", "open_groups"]
    sizes = dict.fromkeys(["n_rows", "n_groups", "n_kept"], "i32")
    yield Spec(
        "batch_topk.list_groups",
        _list_groups,
        dict.fromkeys(keys + places, "*i32") | sizes,
        {"SIZE": 64, "COLUMNS": 256, "STEP": 1024},
    )
