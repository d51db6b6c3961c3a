"""Exact top-k whose [B, F] scores never leave the registers of the product that makes them.

Three launches, no atomics, no host synchronisation; docs/kernels.md has the proof.

1. `_group_top2` (groups.py): a matrix product whose epilogue keeps, of each row and group of
   columns, the largest key, where it was, and the second largest.
2. `_select_groups`, a program a row: tau, the k-th largest of those keys; which of the maxima are
   among the k best; which groups are *open*, that is may hide another one: at most k // 2 of them.
3. `_merge_open_groups`, a program a row: the open groups are scored again, merged, and sorted.

Keys are int32 in the order of the scores they are made of, NaN above all, so that every comparison
is exact and total. Temporary memory: 9 bytes for each row and group (3.5 % of an fp32 [B, F] at
groups of 64, which is where F >= 256 k; 7 and 14 % at 32 and 16) and 18 k bytes a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import (
    GROUP_SIZES,
    HIGHEST,
    LOWEST,
    TRITON_TYPES,
    affine,
    column,
    group_size,
    group_top2,
    score,
    values_from,
)
from fastsae_kernels.topk.groups import specs as group_specs

NO_ENTRY = tl.constexpr(-(2**63))


def fits(d_sae: int, k: int) -> bool:
    """Whether there are four groups for each latent that is kept.

    With fewer many groups are open (one is enough for exactness), and scoring them again costs more
    than was saved: `eager` does it.
    """
    return d_sae // GROUP_SIZES[-1] >= 4 * k


@jit
def _entry(keys, columns):
    """int64 in the order of an entry's rank: by key, the lower column first among equals."""
    return (keys.to(tl.int64) << 32) | (columns ^ HIGHEST).to(tl.int64)


@jit
def _load_keys(at, groups, n_groups, first_keys, second_keys):
    inside = (groups < n_groups)[None, :]
    first = tl.load(first_keys + at[:, None] + groups[None, :], mask=inside, other=LOWEST)
    second = tl.load(second_keys + at[:, None] + groups[None, :], mask=inside, other=LOWEST)
    return first, second


@jit(do_not_specialize=["n_rows", "k", "most_open"])
def _select_groups(
    first_keys,
    first_members,
    second_keys,
    entries,
    open_groups,
    n_open,
    n_rows,
    n_groups,
    k,
    most_open,
    SIGNED: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < n_rows
    # Rows that do not exist repeat the last one, so that no key is left undefined.
    at = tl.minimum(rows, n_rows - 1).to(tl.int64) * n_groups
    groups = tl.arange(0, BLOCK)
    first, second = _load_keys(at, groups, n_groups, first_keys, second_keys)

    # tau, the largest key that k keys reach, bit by bit from the top.
    tau = tl.full((ROWS,), LOWEST if SIGNED else 0, tl.int32)
    bit = tl.full((), LOWEST if SIGNED else 1 << 30, tl.int32)
    for _ in range(32 if SIGNED else 31):
        key = tau ^ bit
        bit = (bit >> 1) & HIGHEST
        above = (first >= key[:, None]).to(tl.int32) + (second >= key[:, None]).to(tl.int32)
        reached = tl.sum(above, 1)
        if not ONE_BLOCK:
            for start in range(BLOCK, n_groups, BLOCK):
                more1, more2 = _load_keys(at, start + groups, n_groups, first_keys, second_keys)
                above = (more1 >= key[:, None]).to(tl.int32) + (more2 >= key[:, None]).to(tl.int32)
                reached += tl.sum(above, 1)
        tau = tl.where(reached >= k, key, tau)

    threshold = tau[:, None]
    first_above = tl.sum((first > threshold).to(tl.int32), 1)
    second_above = tl.sum((second > threshold).to(tl.int32), 1)
    level = tl.sum((first == threshold).to(tl.int32), 1)
    if not ONE_BLOCK:
        for start in range(BLOCK, n_groups, BLOCK):
            more1, more2 = _load_keys(at, start + groups, n_groups, first_keys, second_keys)
            first_above += tl.sum((more1 > threshold).to(tl.int32), 1)
            second_above += tl.sum((more2 > threshold).to(tl.int32), 1)
            level += tl.sum((more1 == threshold).to(tl.int32), 1)
    # Groups whose second key equals tau are opened only if all the others do not make k.
    level_open = tl.maximum(k - first_above - second_above - level, 0)

    # Entries above tau go to the left of the row's k, those equal to tau to the right, as far as
    # they find room; what stays free is for the open groups.
    n_sure = tl.zeros((ROWS,), tl.int32)
    n_level = tl.zeros((ROWS,), tl.int32)
    n_tied = tl.zeros((ROWS,), tl.int32)
    n_opened = tl.zeros((ROWS,), tl.int32)
    entries += rows.to(tl.int64)[:, None] * k
    open_groups += rows.to(tl.int64)[:, None] * most_open
    start = 0
    while start < n_groups:
        # Read again, a few at a time: all of them and their places would not fit into registers.
        here = start + tl.arange(0, STEP)
        key1, key2 = _load_keys(at, here, n_groups, first_keys, second_keys)
        inside = (here < n_groups)[None, :]
        members = tl.load(first_members + at[:, None] + here[None, :], mask=inside, other=0)
        columns = column(here[None, :], members.to(tl.int32), SIZE, COLUMNS)
        tied = (key2 == threshold).to(tl.int32)
        rank = n_tied[:, None] + tl.cumsum(tied, 1) - tied
        opened = (key2 > threshold) | ((key2 == threshold) & (rank < level_open[:, None]))
        sure = (key1 > threshold) & (opened == 0)
        may = (key1 == threshold) & (opened == 0)
        # Three running counts in one scan.
        flags = sure.to(tl.int64) | (may.to(tl.int64) << 21) | (opened.to(tl.int64) << 42)
        counts = tl.cumsum(flags, 1) - flags
        left = n_sure[:, None] + (counts & 0x1FFFFF).to(tl.int32)
        right = k - 1 - n_level[:, None] - ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        place = n_opened[:, None] + (counts >> 42).to(tl.int32)
        entry = _entry(key1, columns)
        tl.store(entries + left, entry, mask=sure & real[:, None])
        room = may & (right >= first_above[:, None])
        tl.store(entries + right, entry, mask=room & real[:, None])
        shown = tl.broadcast_to(here[None, :], (ROWS, STEP))
        tl.store(open_groups + place, shown, mask=opened & real[:, None])
        total = tl.sum(flags, 1)
        n_sure += (total & 0x1FFFFF).to(tl.int32)
        n_level += ((total >> 21) & 0x1FFFFF).to(tl.int32)
        n_opened += (total >> 42).to(tl.int32)
        n_tied += tl.sum(tied, 1)
        start += STEP
    tl.store(n_open + rows, n_opened, mask=real)
    taken = tl.maximum(k - n_level, first_above)
    start = 0
    while start < k:
        slots = (start + tl.arange(0, SLOTS))[None, :]
        free = (slots >= n_sure[:, None]) & (slots < taken[:, None]) & real[:, None]
        below_all = tl.broadcast_to(slots.to(tl.int64) + (NO_ENTRY + 1), (ROWS, SLOTS))
        tl.store(entries + slots, below_all, mask=free)
        start += SLOTS


@jit
def _larger(others, entries):
    """[R, N]: how many of `others` [R, M] are larger than each of `entries` [R, N]."""
    return tl.sum((others[:, None, :] > entries[:, :, None]).to(tl.int32), 2)


@jit(do_not_specialize=["n_rows", "k", "most_open"])
def _merge_open_groups(
    x,
    W_enc,
    offset,
    scale,
    entries,
    spare,
    open_groups,
    n_open,
    acts,
    indices,
    n_rows,
    d_in,
    d_sae,
    k,
    most_open,
    stride_x,
    stride_d,
    stride_f,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (rows < n_rows)[:, None]
    at = rows.to(tl.int64)[:, None] * k
    slots = tl.arange(0, CHUNK)[None, :]

    # Sorted by counting the larger ones: entries are distinct.
    source = entries
    target = spare
    start = 0
    while start < k:
        mine = tl.load(source + at + start + slots, mask=real & (start + slots < k), other=NO_ENTRY)
        rank = tl.zeros((ROWS, CHUNK), tl.int32)
        other = 0
        while other < k:
            mask = real & (other + slots < k)
            rank += _larger(tl.load(source + at + other + slots, mask=mask, other=NO_ENTRY), mine)
            other += CHUNK
        tl.store(target + at + rank, mine, mask=real & (start + slots < k))
        start += CHUNK
    tl.debug_barrier()

    opened = tl.load(n_open + rows, mask=rows < n_rows, other=0)
    members = tl.arange(0, SIZE)[None, :]
    for number in range(0, tl.max(opened)):
        source, target = target, source
        busy = (number < opened)[:, None]
        group = tl.load(
            open_groups + rows.to(tl.int64) * most_open + number, mask=number < opened, other=0
        )
        columns = column(group[:, None], members, SIZE, COLUMNS)
        inside = busy & (columns < d_sae)
        keys = score(
            x + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * stride_x,
            W_enc,
            offset,
            scale,
            columns,
            inside,
            d_in,
            stride_d,
            stride_f,
            SCALED,
            SIGNED,
            PRODUCT,
            DEPTH,
        )
        found = tl.where(inside, _entry(keys, columns), NO_ENTRY)

        rank = _larger(found, found)
        start = 0
        while start < k:
            mask = busy & (start + slots < k)
            held = tl.load(source + at + start + slots, mask=mask, other=NO_ENTRY)
            rank += _larger(held, found)
            moved = start + slots + _larger(found, held)
            tl.store(target + at + moved, held, mask=mask & (moved < k))
            start += CHUNK
        tl.store(target + at + rank, found, mask=inside & (rank < k))
        # Rows that have no more open groups come along.
        start = 0
        while start < k:
            mask = real & (busy == 0) & (start + slots < k)
            held = tl.load(source + at + start + slots, mask=mask)
            tl.store(target + at + start + slots, held, mask=mask)
            start += CHUNK
        tl.debug_barrier()

    start = 0
    while start < k:
        mask = real & (start + slots < k)
        entry = tl.load(target + at + start + slots, mask=mask, other=0)
        tl.store(acts + at + start + slots, values_from((entry >> 32).to(tl.int32)), mask=mask)
        latents = (entry & HIGHEST).to(tl.int32) ^ HIGHEST
        tl.store(indices + at + start + slots, latents, mask=mask)
        start += CHUNK


def select_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor]:
    n_rows, (d_in, d_sae) = len(x), W_enc.shape
    acts = torch.empty(n_rows, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    if n_rows == 0:
        return acts, indices
    x, (offset, scale) = x.contiguous(), affine(b_enc, scale)
    found = group_top2(x, W_enc, offset, group_size(d_sae, k), scale, signed)
    n_groups = found.first_keys.shape[1]
    most_open = max(1, k // 2)
    entries = torch.empty(2, n_rows, k, dtype=torch.int64, device=x.device)
    open_groups = torch.empty(n_rows, most_open, dtype=torch.int32, device=x.device)
    n_open = torch.empty(n_rows, dtype=torch.int32, device=x.device)
    block = min(padded(n_groups), MOST_RESIDENT)
    rows = min(max(1, 4096 // block), padded(n_rows, 1))
    chunk = _merge_chunk(k)
    merged = min(MERGED_ROWS, padded(n_rows, 1))
    with device_of(x):
        _select_groups[(triton.cdiv(n_rows, rows),)](
            *found[:3],
            entries[0],
            open_groups,
            n_open,
            n_rows,
            n_groups,
            k,
            most_open,
            SIGNED=signed,
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=rows,
            BLOCK=block,
            ONE_BLOCK=n_groups <= block,
            STEP=_select_step(block, rows),
            SLOTS=chunk,
            num_warps=_select_warps(block),
        )
        _merge_open_groups[(triton.cdiv(n_rows, merged),)](
            x,
            W_enc,
            offset,
            offset if scale is None else scale,
            entries[0],
            entries[1],
            open_groups,
            n_open,
            acts,
            indices,
            n_rows,
            d_in,
            d_sae,
            k,
            most_open,
            x.stride(0),
            W_enc.stride(0),
            W_enc.stride(1),
            SCALED=scale is not None,
            SIGNED=signed,
            PRODUCT=TRITON_TYPES[x.dtype],
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=merged,
            CHUNK=chunk,
            DEPTH=4096 // found.layout.size,
            num_warps=4,
        )
    return acts, indices


MOST_RESIDENT = 16384
"""Groups of a row that stay in the registers of one program; more are read again and again."""
MERGED_ROWS = 8 if interpreted() else 1
"""Rows of a merging program: more spill registers, but the interpreter pays for each program."""


def _merge_chunk(k: int) -> int:
    """Entries that are compared at a time; 32 would spill with Triton 3.6."""
    return 16 if k <= 16 else 64


def _select_warps(block: int) -> int:
    return max(8, min(16, block // 1024))


def _select_step(block: int, rows: int) -> int:
    return min(block, max(16, 1024 // rows))


def specs() -> Iterator[Spec]:
    yield from group_specs()
    for dtype in ("bf16", "fp32"):
        for k in (16, 64):
            for size in GROUP_SIZES:
                yield _merge_spec(dtype, k, size)
    for block in (1024, 4096, MOST_RESIDENT):
        yield _select_spec(block, block == 4096)


def _select_spec(block: int, default: bool) -> Spec:
    pointers = {"first_keys": "*i32", "first_members": "*i8", "second_keys": "*i32"}
    pointers |= {"entries": "*i64", "open_groups": "*i32", "n_open": "*i32"}
    return Spec(
        f"topk.select_groups[{block} groups]",
        _select_groups,
        {**pointers, **dict.fromkeys(("n_rows", "n_groups", "k", "most_open"), "i32")},
        {
            "SIGNED": False,
            "SIZE": 64,
            "COLUMNS": 256,
            "ROWS": max(1, 4096 // block),
            "BLOCK": block,
            "ONE_BLOCK": True,
            "STEP": _select_step(block, max(1, 4096 // block)),
            "SLOTS": 64,
        },
        _select_warps(block),
        default=default,
    )


def _merge_spec(dtype: str, k: int, size: int) -> Spec:
    pointers = {"x": f"*{dtype}", "W_enc": f"*{dtype}", "offset": "*fp32", "scale": "*fp32"}
    pointers |= {"entries": "*i64", "spare": "*i64", "open_groups": "*i32", "n_open": "*i32"}
    pointers |= {"acts": "*fp32", "indices": "*i32"}
    sizes = ("n_rows", "d_in", "d_sae", "k", "most_open", "stride_x", "stride_f")
    return Spec(
        f"topk.merge_open_groups[{dtype}, k = {k}, groups of {size}]",
        _merge_open_groups,
        {**pointers, **dict.fromkeys(sizes, "i32")},
        {
            "stride_d": 1,
            "SCALED": True,
            "SIGNED": False,
            "PRODUCT": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
            "SIZE": size,
            "COLUMNS": 256,
            "ROWS": 1,
            "CHUNK": _merge_chunk(k),
            "DEPTH": 4096 // size,
        },
        default=size == 64,
    )
