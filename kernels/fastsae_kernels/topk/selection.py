"""Which of a row's two keys a group are among its k best, and which groups may hide another one."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import Groups
from fastsae_kernels.topk.keys import (
    HIGHEST,
    LOWEST,
    NO_ENTRY,
    bound_of,
    column,
    entry_of,
    first_member,
    second_member,
)

WARP_GROUPS = 2048
"""Groups whose keys one warp holds in its registers, so that counting them needs no barrier."""
MOST_RESIDENT = 16384
"""Groups of a row that stay in the registers of one program; more are read again and again."""
FREE_SLOTS = 16
"""Free slots of a row that are filled at a time. With 64, Triton 3.6 moved the mask [16, 64] to the
lanes that store wrongly (its pull request 9680 is about such moves), so that rows filled slots of
the next; [16, 16] is also the shape in which entries are placed."""


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
    tl.store(entries + place, entry_of(keys, columns), mask=kept & real[:, None])


def select_groups(
    found: Groups, k: int, signed: bool, entries: Tensor, open_groups: Tensor, n_open: Tensor
) -> None:
    """Write the entries of closed groups [B, k] int64, below all others where a slot is free, and
    the open groups [B, k], of which each row has n_open [B]."""
    n_rows, n_groups = found.first_keys.shape
    block = min(padded(n_groups), MOST_RESIDENT)
    rows = min(max(1, WARP_GROUPS // block), padded(n_rows, 1))
    with device_of(found.first_keys):
        _select_groups[(triton.cdiv(n_rows, rows),)](
            *found[:3],
            entries,
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


def _select_warps(block: int) -> int:
    return max(1, block // WARP_GROUPS)


def _select_step(block: int, rows: int) -> int:
    return min(block, max(16, 256 * _select_warps(block) // rows))


def _select_subsets(n_groups: int, k: int, signed: bool) -> int:
    """k at least, of the groups that one program holds; 0: tau is sought from the top bit on."""
    subsets = padded(k)
    return 0 if signed or not 2 * subsets <= n_groups <= MOST_RESIDENT else subsets


def specs() -> Iterator[Spec]:
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
