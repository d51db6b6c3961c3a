"""Exact top-k whose [B, F] scores never leave the registers of the product that makes them.

Three launches, no atomics, no host synchronisation; docs/kernels.md has the proof.

1. `_group_top2`: a matrix product whose epilogue keeps, of each row and group of columns, the
   largest key, where it was, and the second largest.
2. `_select_groups`, a program a row: tau, the k-th largest of those keys; which of the maxima are
   among the k best; which groups are *open*, that is may hide another one: at most k // 2 of them.
3. `_merge_open_groups`, a program a row: the open groups are scored again, merged, and sorted.

Keys are int32 in the order of the scores they are made of, NaN above all, so that every comparison
is exact and total. Temporary memory: 9 bytes for each row and group (3.5 % of an fp32 [B, F] at
groups of 64, which is where F >= 256 k; 7 and 14 % at 32 and 16) and 18 k bytes a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._triton import UPCAST_DOTS, Spec, device_of, jit, padded

LOWEST = tl.constexpr(-(2**31))
"""Below every key: a column that does not exist."""
HIGHEST = tl.constexpr(2**31 - 1)
NO_ENTRY = tl.constexpr(-(2**63))

GROUP_SIZES = (64, 32, 16)


class Tile(NamedTuple):
    """How the product is divided; a fixed table, since tuning at run time would change bits."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """128 of a thread let two programs of 8 warps share a multiprocessor: one's epilogue runs
    under the other's product."""


HALF_TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(64, 256, 64, 8, 2, 128),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 4),
)
SMALL_TILE = HALF_TILES[2]
"""For epilogues that need more registers, and GPUs with 100 KB of shared memory."""
HIP_TILE = Tile(128, 128, 32, 8, 2)
FLOAT_TILES = (Tile(64, 128, 16, 8, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 16, 8, 3))


def fits(d_sae: int, k: int) -> bool:
    """Whether there are four groups for each latent that is kept.

    With fewer many groups are open (one is enough for exactness), and scoring them again costs more
    than was saved: `eager` does it.
    """
    return d_sae // GROUP_SIZES[-1] >= 4 * k


def group_size(d_sae: int, k: int) -> int:
    """Large groups save memory; four for each latent that is kept are seldom open."""
    return next((size for size in GROUP_SIZES if d_sae // size >= 4 * k), GROUP_SIZES[-1])


@jit
def _keys(values, SIGNED: tl.constexpr):
    """int32 keys in the order of fp32 values, of their ReLU unless SIGNED; NaN above all."""
    if SIGNED:
        bits = (values + 0.0).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(values != values, HIGHEST, ordered)
    positive = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _values(keys):
    """The fp32 values of keys."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit(do_not_specialize=["n_rows"])
def _group_top2(
    x,
    W_enc,
    offset,
    scale,
    limit,
    first_keys,
    first_members,
    second_keys,
    n_rows,
    d_in,
    d_sae,
    n_groups,
    stride_x,
    stride_d,
    stride_f,
    SCALED: tl.constexpr,
    LIMITED: tl.constexpr,
    SIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    # Programs that run together share rows and columns: bands of BAND row tiles, column by column.
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    n_column_tiles = tl.cdiv(d_sae, COLUMNS)
    program = tl.program_id(0)
    band = program // (BAND * n_column_tiles)
    height = min(n_row_tiles - band * BAND, BAND)
    inner = program - band * BAND * n_column_tiles
    row_tile = band * BAND + inner % height
    column_tile = inner // height

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    if not DESCRIPTORS:
        depth = tl.arange(0, DEPTH)
        left = x + rows.to(tl.int64)[:, None] * stride_x + depth[None, :]
        right = W_enc + columns.to(tl.int64)[None, :] * stride_f + depth[:, None] * stride_d
    for start in range(0, d_in, DEPTH):
        if DESCRIPTORS:
            a = x.load([row_tile * ROWS, start])
            b = W_enc.load([column_tile * COLUMNS, start]).T
        elif EVEN:
            a = tl.load(left, mask=rows[:, None] < n_rows, other=0.0)
            b = tl.load(right)
        else:
            inside = start + depth < d_in
            a = tl.load(left, mask=(rows[:, None] < n_rows) & inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None] & (columns[None, :] < d_sae), other=0.0)
        b = b.to(a.dtype)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, products, input_precision="ieee")
        if not DESCRIPTORS:
            left += DEPTH
            right += DEPTH * stride_d

    inside = columns < d_sae
    if SCALED:
        products *= tl.load(scale + columns, mask=inside, other=1.0)[None, :]
    products += tl.load(offset + columns, mask=inside, other=0.0)[None, :]
    keys = _keys(products, SIGNED)
    if LIMITED:
        # "At or below" is what goes, so that NaN stays and is seen.
        below = products <= tl.load(limit + columns, mask=inside, other=0.0)[None, :]
        keys = tl.where(below, LOWEST, keys)
    if not EVEN:
        keys = tl.where(columns[None, :] < d_sae, keys, LOWEST)
    # Members of a group are a stride apart, so that one or two lanes hold whole groups.
    N: tl.constexpr = COLUMNS // SIZE
    keys = tl.reshape(keys, (ROWS, SIZE, N))
    first = tl.max(keys, 1)
    member = tl.arange(0, SIZE)[None, :, None]
    which = tl.min(tl.where(keys == first[:, None, :], member, SIZE), 1)
    if LIMITED:
        second = tl.sum((keys > LOWEST).to(tl.int32), 1)
    else:
        second = tl.max(tl.where(member == which[:, None, :], LOWEST, keys), 1)

    groups = column_tile * N + tl.arange(0, N)
    at = rows.to(tl.int64)[:, None] * n_groups + groups[None, :]
    stored = rows[:, None] < n_rows
    tl.store(first_keys + at, first, mask=stored)
    tl.store(first_members + at, which.to(tl.int8), mask=stored)
    tl.store(second_keys + at, second, mask=stored)


@jit
def column(groups, members, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    N: tl.constexpr = COLUMNS // SIZE
    return groups // N * COLUMNS + members * N + groups % N


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


@jit
def _score(
    x,
    W_enc,
    offset,
    scale,
    columns,
    inside,
    d_in,
    stride_d,
    stride_f,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Keys of rows `x` [R, 1] (pointers) at `columns` [R, N], where `inside`; LOWEST elsewhere.

    Operands are rounded like those of `_group_top2`.
    """
    right = W_enc + columns.to(tl.int64)[:, :, None] * stride_f
    sums = tl.zeros((columns.shape[0], columns.shape[1], DEPTH), tl.float32)
    for start in range(0, d_in, DEPTH):
        depth = (start + tl.arange(0, DEPTH))[None, :]
        within = depth < d_in
        values = tl.load(x + depth, mask=within, other=0.0)
        weights = tl.load(
            right + depth.to(tl.int64)[:, None, :] * stride_d,
            mask=inside[:, :, None] & within[:, None, :],
            other=0.0,
        )
        sums += weights.to(PRODUCT).to(tl.float32) * values.to(tl.float32)[:, None, :]
    products = tl.sum(sums, 2)
    if SCALED:
        products *= tl.load(scale + columns, mask=inside, other=1.0)
    products += tl.load(offset + columns, mask=inside, other=0.0)
    return tl.where(inside, _keys(products, SIGNED), LOWEST)


@jit
def _score_groups(
    x,
    W_enc,
    offset,
    scale,
    rows,
    groups,
    n_listed,
    keys,
    d_in,
    d_sae,
    stride_x,
    stride_d,
    stride_f,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    number = tl.program_id(0)
    members = tl.arange(0, SIZE)[None, :]
    listed = number < tl.load(n_listed)
    row = tl.load(rows + number, mask=listed, other=0).to(tl.int64)
    columns = column(tl.load(groups + number, mask=listed, other=0), members, SIZE, COLUMNS)
    found = _score(
        x + row * stride_x + tl.zeros((1, 1), tl.int32),
        W_enc,
        offset,
        scale,
        columns,
        listed & (columns < d_sae),
        d_in,
        stride_d,
        stride_f,
        SCALED,
        SIGNED,
        PRODUCT,
        DEPTH,
    )
    tl.store(keys + number.to(tl.int64) * SIZE + members, found)


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
        keys = _score(
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
        tl.store(acts + at + start + slots, _values((entry >> 32).to(tl.int32)), mask=mask)
        latents = (entry & HIGHEST).to(tl.int32) ^ HIGHEST
        tl.store(indices + at + start + slots, latents, mask=mask)
        start += CHUNK


class Layout(NamedTuple):
    """Which columns make a group: `columns` of a tile, every (columns / size)th of them."""

    columns: int
    size: int


class Groups(NamedTuple):
    """What the first launch leaves of each row and group of columns."""

    first_keys: Tensor
    """[B, G] int32: the largest key."""
    first_members: Tensor
    """[B, G] int8: the member of the group that has it."""
    second_keys: Tensor
    """[B, G] int32: the second largest key; with a limit, how many members are above theirs."""
    layout: Layout


def affine(b_enc: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """offset, scale [F] in fp32: (product + b_enc) * scale = product * scale + offset."""
    if scale is None:
        return b_enc.float(), None
    return b_enc.float() * scale.float(), scale.float()


def choose_tile(x: Tensor, limited: bool) -> Tile:
    """The tile of a product: the first of the table, or what a lesser GPU has memory for."""
    tile = FLOAT_TILES[0] if x.dtype == torch.float32 else HALF_TILES[0]
    if x.dtype != torch.float32 and x.is_cuda:
        if torch.version.hip:
            tile = HIP_TILE
        elif limited or torch.cuda.get_device_capability(x.device) < (9, 0):
            tile = SMALL_TILE
    return tile._replace(rows=min(tile.rows, padded(len(x))))


def group_top2(
    x: Tensor,
    W_enc: Tensor,
    offset: Tensor,
    size: int,
    scale: Tensor | None,
    signed: bool,
    limit: Tensor | None = None,
) -> Groups:
    """Launch the product. `offset` [F] is added to it after `scale` [F] multiplied it, in fp32.

    With a `limit` [F], only the keys of values above their column's count.
    """
    tile = choose_tile(x, limit is not None)
    d_in, d_sae = W_enc.shape
    n_column_tiles = -(-d_sae // tile.columns)
    n_groups = n_column_tiles * (tile.columns // size)
    shape = len(x), n_groups
    first_keys = torch.empty(shape, dtype=torch.int32, device=x.device)
    second_keys = torch.empty_like(first_keys)
    first_members = torch.empty(shape, dtype=torch.int8, device=x.device)
    descriptors = _takes_descriptors(x, W_enc)
    left, right = (x, W_enc) if not descriptors else _descriptors(x, W_enc, tile)
    n_tiles = -(-len(x) // tile.rows) * n_column_tiles
    with device_of(x):
        _group_top2[(n_tiles,)](
            left,
            right,
            offset,
            offset if scale is None else scale,
            offset if limit is None else limit,
            first_keys,
            first_members,
            second_keys,
            len(x),
            d_in,
            d_sae,
            n_groups,
            x.stride(0),
            W_enc.stride(0),
            W_enc.stride(1),
            SCALED=scale is not None,
            LIMITED=limit is not None,
            SIGNED=signed,
            DESCRIPTORS=descriptors,
            EVEN=d_in % tile.depth == 0 and d_sae % tile.columns == 0,
            UPCAST=UPCAST_DOTS,
            SIZE=size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            BAND=8,
            **_launch_options(tile),
        )
    return Groups(first_keys, first_members, second_keys, Layout(tile.columns, size))


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
            PRODUCT=_TYPES[x.dtype],
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=merged,
            CHUNK=chunk,
            DEPTH=4096 // found.layout.size,
            num_warps=4,
        )
    return acts, indices


def score_groups(
    x: Tensor,
    W_enc: Tensor,
    offset: Tensor,
    scale: Tensor | None,
    signed: bool,
    layout: Layout,
    rows: Tensor,
    groups: Tensor,
    n_listed: Tensor,
    keys: Tensor,
) -> None:
    """Write the keys of the first `n_listed` (row, group) pairs to `keys` [n, SIZE] int32.

    Columns that do not exist, and pairs beyond, get the lowest key.
    """
    if len(rows) == 0:
        return
    with device_of(x):
        _score_groups[(len(rows),)](
            x,
            W_enc,
            offset,
            offset if scale is None else scale,
            rows,
            groups,
            n_listed,
            keys,
            *W_enc.shape,
            x.stride(0),
            W_enc.stride(0),
            W_enc.stride(1),
            SCALED=scale is not None,
            SIGNED=signed,
            PRODUCT=_TYPES[x.dtype],
            SIZE=layout.size,
            COLUMNS=layout.columns,
            DEPTH=4096 // layout.size,
            num_warps=4,
        )


def member_columns(groups: Tensor, layout: Layout) -> Tensor:
    """[n, SIZE] int64: the columns that are members of `groups` [n]."""
    per_tile = layout.columns // layout.size
    members = torch.arange(layout.size, device=groups.device) * per_tile
    first = groups.long() // per_tile * layout.columns + groups.long() % per_tile
    return first[:, None] + members


def keys_of(values: Tensor) -> Tensor:
    """The int32 keys of fp32 values."""
    bits = values.view(torch.int32)
    return torch.where(values.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))


def values_of(keys: Tensor) -> Tensor:
    """The fp32 values of int32 keys."""
    return (keys ^ ((keys >> 31) & (2**31 - 1))).view(torch.float32)


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


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _launch_options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.max_registers is not None and not torch.version.hip:
        options["maxnreg"] = tile.max_registers
    return options


def _takes_descriptors(x: Tensor, W_enc: Tensor) -> bool:
    """Hopper's tensor copies want rows of whole 16 bytes, contiguous, in one dtype each."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    aligned = (t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
               for t in (x, W_enc.t()))  # fmt: skip
    return W_enc.stride(0) == 1 and all(aligned)


def _descriptors(x: Tensor, W_enc: Tensor, tile: Tile) -> tuple[object, object]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(W_enc.t(), [tile.columns, tile.depth]),
    )


def specs() -> Iterator[Spec]:
    for dtype, tiles in (("bf16", HALF_TILES), ("fp32", FLOAT_TILES)):
        for number, tile in enumerate(tiles):
            for size in GROUP_SIZES:
                for descriptors in (False, True):
                    yield _group_top2_spec(dtype, tile, size, descriptors, number == 0)
        uneven = _group_top2_spec(dtype, tiles[0], 64, False, True, EVEN=False)
        yield uneven._replace(name=f"{uneven.name}, uneven")
        tile = SMALL_TILE if dtype == "bf16" else tiles[0]
        signed = _group_top2_spec(dtype, tile, 64, False, True, EVEN=False, SIGNED=True)
        yield signed._replace(name=f"{signed.name}, signed")
        limits = _group_top2_spec(
            dtype, tile, 64, False, True, EVEN=False, SIGNED=True, LIMITED=True
        )
        yield limits._replace(name=f"{limits.name}, limits")
        for k in (16, 64):
            for size in GROUP_SIZES:
                yield _merge_spec(dtype, k, size)
        yield _score_spec(dtype)
    yield _group_top2_spec("bf16", HIP_TILE, 64, False, True)
    for block in (1024, 4096, MOST_RESIDENT):
        yield _select_spec(block, block == 4096)


def _group_top2_spec(
    dtype: str, tile: Tile, size: int, descriptors: bool, default: bool, **changed: bool
) -> Spec:
    operands = {"x": f"*{dtype}", "W_enc": f"*{dtype}"}
    if descriptors:
        operands = {
            "x": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>",
            "W_enc": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>",
        }
    keys = {"first_keys": "*i32", "first_members": "*i8", "second_keys": "*i32"}
    sizes = dict.fromkeys(("n_rows", "d_in", "d_sae", "n_groups", "stride_x", "stride_f"), "i32")
    return Spec(
        f"topk.group_top2[{dtype}, {'x'.join(map(str, tile[:5]))}, groups of {size}"
        f"{', descriptors' if descriptors else ''}]",
        _group_top2,
        {**operands, "offset": "*fp32", "scale": "*fp32", "limit": "*fp32", **keys, **sizes},
        {
            "stride_d": 1,
            "SCALED": True,
            "LIMITED": False,
            "SIGNED": False,
            "DESCRIPTORS": descriptors,
            "EVEN": True,
            "UPCAST": False,
            "SIZE": size,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "BAND": 8,
            **changed,
        },
        tile.num_warps,
        tile.num_stages,
        tile.max_registers,
        default,
    )


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


def _score_spec(dtype: str) -> Spec:
    pointers = {"x": f"*{dtype}", "W_enc": f"*{dtype}", "offset": "*fp32", "scale": "*fp32"}
    pointers |= {"rows": "*i32", "groups": "*i32", "n_listed": "*i32", "keys": "*i32"}
    return Spec(
        f"topk.score_groups[{dtype}]",
        _score_groups,
        {**pointers, **dict.fromkeys(("d_in", "d_sae", "stride_x", "stride_f"), "i32")},
        {
            "stride_d": 1,
            "SCALED": True,
            "SIGNED": False,
            "PRODUCT": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
            "SIZE": 64,
            "COLUMNS": 256,
            "DEPTH": 64,
        },
    )
