"""Every value above its latent's limit, by the groups of the fused top-k encode.

The product's epilogue counts, of each row and group of columns, the members above their limit and
keeps the largest and where it was. One such member: the entry is known. Several: the group is
listed, scored again, and as many of its members as were counted become entries, those furthest
above their limit, so that rounding in another order never changes how many there are. The host
waits once, for the number of entries and of listed groups. Temporary memory: 12 bytes for each
row and group, about 50 bytes an entry, 12 bytes for each listed group, and the workspace, in which
slices of the listed groups are scored.

Where groups that hold several are the rule, as in a ReLU SAE that has not been trained, a dense
product by chunks is faster: `select_above` leaves it to `eager`.
"""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels._workspace import workspace_bytes
from fastsae_kernels.code import MOST_ENTRIES
from fastsae_kernels.topk.groups import affine, group_top2
from fastsae_kernels.topk.keys import (
    GROUP_SIZES,
    Layout,
    column,
    first_member,
    keys_of,
    member_columns,
    values_of,
)
from fastsae_kernels.topk.scores import score_groups

DENSE_ABOVE = 1 / 16
"""Share of the groups that may be listed before the dense product takes over."""
BYTES_A_MEMBER = 64
"""What a member of a listed group takes until it is among the entries."""


@jit
def _list_counted_groups(
    first_keys,
    counts,
    rest,
    entry_starts,
    list_starts,
    entry_keys,
    entry_columns,
    listed_rows,
    listed_groups,
    listed_starts,
    n_groups,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0)
    at = row.to(tl.int64) * n_groups
    entry = tl.load(entry_starts + row)
    listed = tl.load(list_starts + row)
    start = 0
    while start < n_groups:
        groups = start + tl.arange(0, STEP)
        inside = groups < n_groups
        count = tl.load(counts + at + groups, mask=inside, other=0)
        places = entry + tl.cumsum(count) - count
        one = count == 1
        keys = tl.load(first_keys + at + groups, mask=one, other=0)
        members = first_member(tl.load(rest + at + groups, mask=one, other=0))
        tl.store(entry_keys + places, keys, mask=one)
        tl.store(entry_columns + places, column(groups, members, SIZE, COLUMNS), mask=one)
        several = (count > 1).to(tl.int32)
        slots = listed + tl.cumsum(several) - several
        tl.store(listed_rows + slots, tl.zeros((STEP,), tl.int32) + row, mask=count > 1)
        tl.store(listed_groups + slots, groups, mask=count > 1)
        tl.store(listed_starts + slots, places, mask=count > 1)
        entry += tl.sum(count)
        listed += tl.sum(several)
        start += STEP


def select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where the code is so dense, or so empty, that `eager` should make it."""
    n_rows, d_sae = len(x), W_enc.shape[1]
    if n_rows == 0:
        return None
    x, (offset, factor) = x.contiguous(), affine(b_enc, scale)
    found = group_top2(x, W_enc, offset, GROUP_SIZES[0], factor, True, limit)
    counts = found.second_keys
    n_several = (counts > 1).sum(1, dtype=torch.int32)
    row_ends = counts.sum(1, dtype=torch.int64).cumsum(0)
    list_ends = n_several.cumsum(0, dtype=torch.int32)
    nnz, n_listed = torch.stack([row_ends[-1], list_ends[-1]]).tolist()  # the host waits
    if nnz > MOST_ENTRIES:
        raise ValueError(
            f"threshold must leave at most 2^31 - 1 entries (row offsets are int32), got {nnz}; "
            "encode fewer rows at a time"
        )
    if n_listed > DENSE_ABOVE * counts.numel():
        return None
    row_offsets = torch.nn.functional.pad(row_ends, (1, 0)).int()
    listed = torch.empty(3, n_listed, dtype=torch.int32, device=x.device)
    keys = torch.empty(nnz + 1, dtype=torch.int32, device=x.device)
    columns = torch.empty_like(keys)
    n_groups = counts.shape[1]
    with device_of(x):
        _list_counted_groups[(n_rows,)](
            found.first_keys,
            counts,
            found.rest,
            row_offsets,
            list_ends - n_several,
            keys,
            columns,
            *listed,
            n_groups,
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            STEP=min(padded(n_groups), 1024),
            num_warps=4,
        )
    layout = found.layout
    n_slice = max(1, workspace_bytes() // (BYTES_A_MEMBER * layout.size))
    for part in listed.split(n_slice, dim=1) if n_listed else ():
        _add_listed(x, W_enc, offset, factor, limit, layout, part, counts, keys, columns)
    rows = torch.repeat_interleave(row_offsets.diff(), output_size=nnz).long()
    order = (rows * d_sae + columns[:nnz]).argsort()
    return row_offsets, columns[order], values_of(keys[order])


def _add_listed(
    x: Tensor,
    W_enc: Tensor,
    offset: Tensor,
    scale: Tensor | None,
    limit: Tensor,
    layout: Layout,
    listed: Tensor,
    counts: Tensor,
    keys: Tensor,
    columns: Tensor,
) -> None:
    """Write the entries of listed groups behind those of the groups before them in their row."""
    rows, groups, starts = listed
    n_listed = torch.full((), len(rows), dtype=torch.int32, device=x.device)
    scored = torch.empty(len(rows), layout.size, dtype=torch.int32, device=x.device)
    score_groups(x, W_enc, offset, scale, True, layout, rows, groups, n_listed, scored)
    members = member_columns(groups, layout)
    above = values_of(scored) - limit[members.clamp(max=len(limit) - 1)]
    above = above.masked_fill(members >= len(limit), -torch.inf)
    order = above.argsort(dim=1, descending=True, stable=True)  # NaN first
    rank = torch.arange(layout.size, device=x.device)
    taken = rank < counts[rows.long(), groups.long()][:, None]
    # Members that are no entries go to the place behind the last one, which nobody reads.
    places = torch.where(taken, starts.long()[:, None] + rank, len(keys) - 1)
    # A member that was counted is above its limit, even where this order of summation says less.
    floor = torch.nextafter(limit, limit.new_tensor(torch.inf))[members.clamp(max=len(limit) - 1)]
    values = values_of(scored)
    scored = keys_of(torch.where(values < floor, floor, values))
    keys.scatter_(0, places.view(-1), scored.gather(1, order).view(-1))
    columns.scatter_(0, places.view(-1), members.gather(1, order).int().view(-1))


def specs() -> Iterator[Spec]:
    names = (
        "first_keys",
        "counts",
        "rest",
        "entry_starts",
        "list_starts",
        "entry_keys",
        "entry_columns",
    )
    names += ("listed_rows", "listed_groups", "listed_starts")
    yield Spec(
        "threshold.list_counted_groups",
        _list_counted_groups,
        {**dict.fromkeys(names, "*i32"), "n_groups": "i32"},
        {"SIZE": 64, "COLUMNS": 256, "STEP": 1024},
    )
