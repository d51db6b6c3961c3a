"""Exact top-k whose [B, F] scores never leave the registers of the product that makes them.

Four launches, no atomics, no host synchronisation; docs/kernels.md has the proof.

1. `_group_top2` (groups.py): a matrix product whose epilogue keeps, of each row and group of
   columns, two of the largest keys, where they were, and a bound of all the others.
2. `_select_groups`, a warp a row: tau, which k of those keys reach; which of them are among the k
   best; which groups are *open*, that is may hide another one: at most k of them, seldom any.
3. `_sort_entries`, a warp a row: the k best of a row without open groups, in order.
4. `_merge_open_groups`: the open groups of the other rows are scored again and merged.

Keys are int32 in the order of the scores they are made of, NaN above all, so that every comparison
is exact and total. Temporary memory: 12 bytes for each row and group (4.7 % of an fp32 [B, F] at
groups of 64, which is where F >= 256 k; 9.4 and 19 % at 32 and 16) and 20 k bytes a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import affine, group_top2
from fastsae_kernels.topk.groups import specs as group_specs
from fastsae_kernels.topk.keys import (
    GROUP_SIZES,
    HIGHEST,
    LOWEST,
    bound_of,
    column,
    first_member,
    group_size,
    second_member,
    values_from,
)
from fastsae_kernels.topk.scores import AOT_TYPES, TRITON_TYPES, score
from fastsae_kernels.topk.scores import specs as score_specs

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


@jit
def _count_above(first, second, floor):
    """[R]: how many of both kinds of keys [R, G] are above `floor` [R]."""
    both = (first > floor[:, None]).to(tl.int32) + (second > floor[:, None]).to(tl.int32)
    return tl.sum(both, 1)


@jit(do_not_specialize=["n_rows", "k"])
def _select_groups(
    first_keys,
    second_keys,
    rest,
    entries,
    open_groups,
    n_open,
    n_rows,
    n_groups,
    k,
    SIGNED: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    SUBSETS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < n_rows
    # Rows that do not exist repeat the last one, so that no key is left undefined.
    at = tl.minimum(rows, n_rows - 1).to(tl.int64) * n_groups
    groups = tl.arange(0, BLOCK)
    first, second = _load_keys(at, groups, n_groups, first_keys, second_keys)

    # tau: at most k keys are above it, at least k reach it. Bit by bit from the top, until exactly
    # k are above or there is no bit left (tau is then the k-th largest key).
    tau = tl.full((ROWS,), LOWEST if SIGNED else 0, tl.int32)
    bit = tl.full((), LOWEST if SIGNED else 1 << 30, tl.int32)
    if SUBSETS > 0:
        # As many keys as there are subsets reach the least of their maxima: the bits in which that
        # and the largest key agree are tau's.
        maxima = tl.max(tl.reshape(first, (ROWS, BLOCK // SUBSETS, SUBSETS)), 1)
        low = tl.maximum(tl.min(maxima, 1), 0)
        apart = low ^ tl.max(maxima, 1)
        for shift in tl.static_range(5):
            apart |= apart >> (1 << shift)
        unknown = tl.max(apart, 0)
        tau = low & (unknown ^ -1)
        bit = unknown ^ (unknown >> 1)
    settled = tl.zeros((ROWS,), tl.int32)
    above = tl.zeros((ROWS,), tl.int32)
    last = 0
    while last == 0:
        last = ((bit == 0) | (tl.min(settled, 0) != 0)).to(tl.int32)
        # After the last bit, or once all is settled, only the keys above tau are counted.
        floor = tl.where((settled != 0) | (bit == 0), tau, (tau ^ bit) - 1)
        above = _count_above(first, second, floor)
        if not ONE_BLOCK:
            for start in range(BLOCK, n_groups, BLOCK):
                more1, more2 = _load_keys(at, start + groups, n_groups, first_keys, second_keys)
                above += _count_above(more1, more2, floor)
        tau = tl.where(above > k, floor + 1, tl.where(above == k, floor, tau))
        settled |= (above == k).to(tl.int32)
        bit = (bit >> 1) & HIGHEST
    threshold = tau[:, None]

    # Entries above tau go to the left of the row's k, those equal to tau to the right, as far as
    # they find room; what stays free is for the open groups.
    n_sure = tl.zeros((ROWS,), tl.int32)
    n_level = tl.zeros((ROWS,), tl.int32)
    n_opened = tl.zeros((ROWS,), tl.int32)
    entries += rows.to(tl.int64)[:, None] * k
    open_groups += rows.to(tl.int64)[:, None] * k
    start = 0
    while start < n_groups:
        # Read again, a few at a time: all of them and their places would not fit into registers.
        here = start + tl.arange(0, STEP)
        key1, key2 = _load_keys(at, here, n_groups, first_keys, second_keys)
        inside = (here < n_groups)[None, :]
        others = tl.load(rest + at[:, None] + here[None, :], mask=inside, other=LOWEST)
        opened = (key1 > threshold) & (bound_of(others) > threshold)
        sure1 = ((key1 > threshold) & (opened == 0)).to(tl.int32)
        sure2 = ((key2 > threshold) & (opened == 0)).to(tl.int32)
        may1 = ((key1 == threshold) & inside).to(tl.int32)
        may2 = ((key2 == threshold) & inside & (opened == 0)).to(tl.int32)
        # Three running counts in one scan.
        flags = (sure1 + sure2).to(tl.int64) | ((may1 + may2).to(tl.int64) << 21)
        flags |= opened.to(tl.int64) << 42
        counts = tl.cumsum(flags, 1) - flags
        left = n_sure[:, None] + (counts & 0x1FFFFF).to(tl.int32)
        right = k - 1 - n_level[:, None] - ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        place = n_opened[:, None] + (counts >> 42).to(tl.int32)
        column1 = column(here[None, :], first_member(others), SIZE, COLUMNS)
        column2 = column(here[None, :], second_member(others), SIZE, COLUMNS)
        _place(entries, key1, column1, sure1, may1, left, right, above, real)
        _place(entries, key2, column2, sure2, may2, left + sure1, right - may1, above, real)
        shown = tl.broadcast_to(here[None, :], (ROWS, STEP))
        tl.store(open_groups + place, shown, mask=opened & real[:, None])
        total = tl.sum(flags, 1)
        n_sure += (total & 0x1FFFFF).to(tl.int32)
        n_level += ((total >> 21) & 0x1FFFFF).to(tl.int32)
        n_opened += (total >> 42).to(tl.int32)
        start += STEP
    tl.store(n_open + rows, n_opened, mask=real)
    taken = tl.maximum(k - n_level, above)
    start = 0
    while start < k:
        slots = (start + tl.arange(0, SLOTS))[None, :]
        free = (slots >= n_sure[:, None]) & (slots < taken[:, None]) & real[:, None]
        below_all = tl.broadcast_to(slots.to(tl.int64) + (NO_ENTRY + 1), (ROWS, SLOTS))
        tl.store(entries + slots, below_all, mask=free)
        start += SLOTS


@jit
def _place(entries, keys, columns, sure, may, left, right, above, real):
    kept = (sure != 0) | ((may != 0) & (right >= above[:, None]))
    place = tl.where(sure != 0, left, right)
    tl.store(entries + place, _entry(keys, columns), mask=kept & real[:, None])


@jit
def _larger(others, entries):
    """[R, N]: how many of `others` [R, M] are larger than each of `entries` [R, N]."""
    return tl.sum((others[:, :, None] > entries[:, None, :]).to(tl.int32), 1)


@jit
def _store_code(acts, indices, at, entry, mask):
    tl.store(acts + at, values_from((entry >> 32).to(tl.int32)), mask=mask)
    tl.store(indices + at, (entry & HIGHEST).to(tl.int32) ^ HIGHEST, mask=mask)


@jit(do_not_specialize=["n_rows", "k"])
def _sort_entries(
    entries,
    in_order,
    n_open,
    acts,
    indices,
    n_rows,
    k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows without open groups are finished here; of the others the entries are put in order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (rows < n_rows)[:, None]
    at = rows.to(tl.int64)[:, None] * k
    slots = tl.arange(0, CHUNK)[None, :]
    finished = (tl.load(n_open + rows, mask=rows < n_rows, other=0) == 0)[:, None]
    # By counting the larger ones: entries are distinct.
    start = 0
    while start < k:
        inside = real & (start + slots < k)
        mine = tl.load(entries + at + start + slots, mask=inside, other=NO_ENTRY)
        rank = tl.zeros((ROWS, CHUNK), tl.int32)
        other = 0
        while other < k:
            mask = real & (other + slots < k)
            rank += _larger(tl.load(entries + at + other + slots, mask=mask, other=NO_ENTRY), mine)
            other += CHUNK
        tl.store(in_order + at + rank, mine, mask=inside & (finished == 0))
        _store_code(acts, indices, at + rank, mine, inside & finished)
        start += CHUNK


@jit(do_not_specialize=["n_rows", "k"])
def _merge_open_groups(
    x,
    W_enc,
    offset,
    scale,
    in_order,
    spare,
    open_groups,
    n_open,
    acts,
    indices,
    n_rows,
    d_in,
    d_sae,
    k,
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
    opened = tl.load(n_open + rows, mask=rows < n_rows, other=0)
    most = tl.max(opened)
    if most == 0:
        return
    at = rows.to(tl.int64)[:, None] * k
    slots = tl.arange(0, CHUNK)[None, :]
    members = tl.arange(0, SIZE)[None, :]
    source, target = spare, in_order
    for number in range(0, most):
        source, target = target, source
        busy = (number < opened)[:, None]
        group = tl.load(open_groups + rows.to(tl.int64) * k + number, mask=number < opened, other=0)
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
        if ROWS > 1:
            # Rows that have no more open groups come along.
            start = 0
            while start < k:
                mask = (rows < n_rows)[:, None] & (busy == 0) & (start + slots < k)
                held = tl.load(source + at + start + slots, mask=mask)
                tl.store(target + at + start + slots, held, mask=mask)
                start += CHUNK
        tl.debug_barrier()

    start = 0
    while start < k:
        mask = (opened > 0)[:, None] & (start + slots < k)
        entry = tl.load(target + at + start + slots, mask=mask, other=0)
        _store_code(acts, indices, at + start + slots, entry, mask)
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
    entries = torch.empty(2, n_rows, k, dtype=torch.int64, device=x.device)
    open_groups = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    n_open = torch.empty(n_rows, dtype=torch.int32, device=x.device)
    block = min(padded(n_groups), MOST_RESIDENT)
    rows = min(max(1, WARP_GROUPS // block), padded(n_rows, 1))
    chunk = _merge_chunk(k)
    few = min(INTERPRETED_ROWS if interpreted() else 1, padded(n_rows, 1))
    with device_of(x):
        _select_groups[(triton.cdiv(n_rows, rows),)](
            *found[:3],
            entries[0],
            open_groups,
            n_open,
            n_rows,
            n_groups,
            k,
            SIGNED=signed,
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=rows,
            BLOCK=block,
            ONE_BLOCK=n_groups <= block,
            STEP=_select_step(block, rows),
            SLOTS=FREE_SLOTS,
            SUBSETS=_select_subsets(n_groups, k, signed),
            num_warps=_select_warps(block),
        )
        _sort_entries[(triton.cdiv(n_rows, few),)](
            entries[0],
            entries[1],
            n_open,
            acts,
            indices,
            n_rows,
            k,
            ROWS=few,
            CHUNK=chunk,
            num_warps=1,
        )
        _merge_open_groups[(triton.cdiv(n_rows, few),)](
            x,
            W_enc,
            offset,
            offset if scale is None else scale,
            entries[1],
            entries[0],
            open_groups,
            n_open,
            acts,
            indices,
            n_rows,
            d_in,
            d_sae,
            k,
            x.stride(0),
            W_enc.stride(0),
            W_enc.stride(1),
            SCALED=scale is not None,
            SIGNED=signed,
            PRODUCT=TRITON_TYPES[x.dtype],
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=few,
            CHUNK=chunk,
            DEPTH=MERGE_BYTES // W_enc.element_size() // found.layout.size,
            num_warps=MERGE_WARPS,
            **({} if torch.version.hip else {"maxnreg": MERGE_REGISTERS}),
        )
    return acts, indices


WARP_GROUPS = 2048
"""Groups whose keys one warp holds in its registers, so that counting them needs no barrier."""
MOST_RESIDENT = 16384
"""Groups of a row that stay in the registers of one program; more are read again and again."""
FREE_SLOTS = 16
"""Free slots of a row that are filled at a time. With 64, Triton 3.6 moved the mask [16, 64] to the
lanes that store wrongly (its pull request 9680 is about such moves), so that rows filled slots of
the next; [16, 16] is also the shape in which entries are placed."""
INTERPRETED_ROWS = 8
"""Rows that a program sorts or merges in the interpreter, which pays for each program; one on a
GPU, where more would spill registers."""
MERGE_BYTES, MERGE_WARPS, MERGE_REGISTERS = 8192, 4, 128
"""Of weights that are read at a time when an open group is scored again."""


def _merge_chunk(k: int) -> int:
    """Entries that are compared at a time; 32 would spill with Triton 3.6."""
    return 16 if k <= 16 else 64


def _select_warps(block: int) -> int:
    return max(1, block // WARP_GROUPS)


def _select_step(block: int, rows: int) -> int:
    return min(block, max(16, 256 * _select_warps(block) // rows))


def _select_subsets(n_groups: int, k: int, signed: bool) -> int:
    """k at least, of the groups that one program holds; 0: tau is sought from the top bit on."""
    subsets = padded(k)
    return 0 if signed or not 2 * subsets <= n_groups <= MOST_RESIDENT else subsets


def specs() -> Iterator[Spec]:
    yield from group_specs()
    yield from score_specs()
    for dtype in ("bf16", "fp32"):
        for k in (16, 64):
            for size in GROUP_SIZES:
                yield _merge_spec(dtype, dtype, k, size)
    yield _merge_spec("fp16", "fp16", 64, 64)
    yield _merge_spec("bf16", "bf16", 64, 64, ", unscaled", SCALED=False)
    yield _merge_spec("bf16", "fp32", 64, 64, ", signed, unscaled", SIGNED=True, SCALED=False)
    for k in (16, 64):
        yield _sort_spec(k)
    for block in (512, 2048, 4096, MOST_RESIDENT):
        yield _select_spec(block, block != 512)
    yield _select_spec(2048, True, ", signed", SIGNED=True, SUBSETS=0)
    yield _select_spec(MOST_RESIDENT, True, " and more", ONE_BLOCK=False, SUBSETS=0)


def _select_spec(block: int, default: bool, note: str = "", **changed: int) -> Spec:
    pointers = dict.fromkeys(("first_keys", "second_keys", "rest", "open_groups", "n_open"), "*i32")
    rows = max(1, WARP_GROUPS // block)
    return Spec(
        f"topk.select_groups[{block} groups{note}]",
        _select_groups,
        {**pointers, "entries": "*i64", **dict.fromkeys(("n_rows", "n_groups", "k"), "i32")},
        {
            "SIGNED": False,
            "SIZE": 64,
            "COLUMNS": 256,
            "ROWS": rows,
            "BLOCK": block,
            "ONE_BLOCK": True,
            "STEP": _select_step(block, rows),
            "SLOTS": FREE_SLOTS,
            "SUBSETS": 64,
            **changed,
        },
        _select_warps(block),
        default=default,
    )


def _sort_spec(k: int) -> Spec:
    pointers = {"entries": "*i64", "in_order": "*i64", "n_open": "*i32"}
    pointers |= {"acts": "*fp32", "indices": "*i32"}
    return Spec(
        f"topk.sort_entries[k = {k}]",
        _sort_entries,
        {**pointers, "n_rows": "i32", "k": "i32"},
        {"ROWS": 1, "CHUNK": _merge_chunk(k)},
        num_warps=1,
    )


def _merge_spec(
    dtype: str, weight: str, k: int, size: int, note: str = "", **changed: bool
) -> Spec:
    pointers = {"x": f"*{dtype}", "W_enc": f"*{weight}", "offset": "*fp32", "scale": "*fp32"}
    pointers |= {"in_order": "*i64", "spare": "*i64", "open_groups": "*i32", "n_open": "*i32"}
    pointers |= {"acts": "*fp32", "indices": "*i32"}
    sizes = ("n_rows", "d_in", "d_sae", "k", "stride_x", "stride_f")
    return Spec(
        f"topk.merge_open_groups[{dtype}{f' by {weight}' if weight != dtype else ''}, "
        f"k = {k}, groups of {size}{note}]",
        _merge_open_groups,
        {**pointers, **dict.fromkeys(sizes, "i32")},
        {
            "stride_d": 1,
            "SCALED": True,
            "SIGNED": False,
            "PRODUCT": AOT_TYPES[dtype],
            "SIZE": size,
            "COLUMNS": 256,
            "ROWS": 1,
            "CHUNK": _merge_chunk(k),
            "DEPTH": MERGE_BYTES // (4 if weight == "fp32" else 2) // size,
            **changed,
        },
        num_warps=MERGE_WARPS,
        max_registers=MERGE_REGISTERS,
        default=size == 64,
    )
