"""One tile of the encoder's product, whose epilogue keeps two keys of each group of its columns."""

import triton.language as tl

from fastsae_kernels._triton import jit
from fastsae_kernels.topk.keys import HIGHEST, LOWEST, keys_from

PART_BITS = tl.constexpr(3)
PART = tl.constexpr(8)
"""Members of a part: a group's two largest keys are those of two of its parts."""


@jit
def tile_top2(
    number,
    x,
    W_enc,
    offset,
    scale,
    limit,
    first_keys,
    second_keys,
    rest,
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
    CANONICAL_NAN: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    # Programs that run together share rows and columns: bands of BAND row tiles, column by column.
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    n_column_tiles = tl.cdiv(d_sae, COLUMNS)
    band = number // (BAND * n_column_tiles)
    height = min(n_row_tiles - band * BAND, BAND)
    inner = number - band * BAND * n_column_tiles
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
    if CANONICAL_NAN and not SIGNED:
        keys = tl.maximum(products.to(tl.int32, bitcast=True), 0)
    else:
        keys = keys_from(products, SIGNED)
    if LIMITED:
        # "At or below" is what goes, so that NaN stays and is seen.
        below = products <= tl.load(limit + columns, mask=inside, other=0.0)[None, :]
        keys = tl.where(below, LOWEST, keys)
    if not EVEN:
        keys = tl.where(columns[None, :] < d_sae, keys, LOWEST)
    # Members of a group are a stride apart, and so are those of its parts, so that a thread holds
    # whole parts and one or two lanes whole groups.
    N: tl.constexpr = COLUMNS // SIZE
    PARTS: tl.constexpr = SIZE // PART
    groups = column_tile * N + tl.arange(0, N)
    at = rows.to(tl.int64)[:, None] * n_groups + groups[None, :]
    stored = rows[:, None] < n_rows
    keys = tl.reshape(keys, (ROWS, PART, PARTS, N))
    best, place, under = _tournament(keys)
    part = tl.arange(0, PARTS)[None, :, None]
    members = place * PARTS + part
    first, member1 = _largest(best, members, SIZE)
    tl.store(first_keys + at, first, mask=stored)
    if LIMITED:
        count = tl.sum(tl.sum((keys > LOWEST).to(tl.int32), 1), 1)
        tl.store(second_keys + at, count, mask=stored)
        tl.store(rest + at, member1 << 8, mask=stored)
    else:
        best = tl.where(part == (member1 % PARTS)[:, None, :], LOWEST, best)
        second, member2 = _largest(best, members, SIZE)
        best = tl.where(part == (member2 % PARTS)[:, None, :], LOWEST, best)
        bound = tl.max(tl.maximum(best, under), 1)
        tl.store(second_keys + at, second, mask=stored)
        bound = (tl.minimum(bound, HIGHEST - 0xFFFF) + 0xFFFF) & -0x10000
        tl.store(rest + at, bound | (member1 << 8) | member2, mask=stored)


@jit
def _tournament(keys):
    """Of each part [R, P, S, N] -> [R, S, N]: the largest key, its number in the part, the second.

    By halves, which stay in a thread's registers: 37 instructions for 8 keys.
    """
    best = keys
    place = tl.zeros(keys.shape, tl.int32)
    under = tl.full(keys.shape, LOWEST, tl.int32)
    for _ in tl.static_range(PART_BITS):
        a, b = _halves(best)
        place_a, place_b = _halves(place)
        under_a, under_b = _halves(under)
        under = tl.maximum(tl.minimum(a, b), tl.maximum(under_a, under_b))
        place = tl.where(a >= b, place_a, place_b + a.shape[1])
        best = tl.maximum(a, b)
    shape: tl.constexpr = (keys.shape[0], keys.shape[2], keys.shape[3])
    return tl.reshape(best, shape), tl.reshape(place, shape), tl.reshape(under, shape)


@jit
def _halves(x):
    """[R, P, S, N] -> its two halves [R, P / 2, S, N]."""
    halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3]))
    return tl.split(tl.permute(halves, (0, 2, 3, 4, 1)))


@jit
def _largest(keys, members, SIZE: tl.constexpr):
    """The largest of keys [R, P, N] over P, and the lowest of the `members` that have it."""
    largest = tl.max(keys, 1)
    return largest, tl.min(tl.where(keys == largest[:, None, :], members, SIZE), 1)
