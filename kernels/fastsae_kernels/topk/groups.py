"""Groups of columns and two of their largest keys: what every fused encode is made of.

`_group_top2` is a matrix product whose epilogue keeps, of each row and group of columns, the
largest key, the largest of the group's other parts, where both were, and a bound of all the rest:
12 bytes for each row and group, 4.7 % of an fp32 [B, F] at groups of 64. What listed groups hold
beside that is scored again (scores.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import UPCAST_DOTS, Spec, device_of, jit, padded
from fastsae_kernels.topk.keys import GROUP_SIZES, HIGHEST, LOWEST, Layout, keys_from

PART_BITS = tl.constexpr(3)
PART = tl.constexpr(8)
"""Members of a part: a group's two largest keys are those of two of its parts."""


class Tile(NamedTuple):
    """How the product is divided; a fixed table, since tuning at run time would change bits."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


HALF_TILES = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
SMALL_TILE = HALF_TILES[3]
"""For epilogues that need more registers, and GPUs with 100 KB of shared memory."""
HIP_TILE = Tile(128, 128, 32, 8, 2)
FLOAT_TILES = (Tile(64, 128, 16, 8, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 16, 8, 3))


@jit(do_not_specialize=["n_rows"])
def _group_top2(
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
    PERSISTENT: tl.constexpr,
):
    if PERSISTENT:
        # A program goes through several tiles and has the next one's operands on their way during
        # an epilogue: the loops are flattened, and the pipeline runs across tiles.
        n_tiles = tl.cdiv(n_rows, ROWS) * tl.cdiv(d_sae, COLUMNS)
        for number in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
            _tile_top2(
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
                SCALED,
                LIMITED,
                SIGNED,
                DESCRIPTORS,
                EVEN,
                UPCAST,
                CANONICAL_NAN,
                SIZE,
                ROWS,
                COLUMNS,
                DEPTH,
                BAND,
            )
    else:
        _tile_top2(
            tl.program_id(0),
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
            SCALED,
            LIMITED,
            SIGNED,
            DESCRIPTORS,
            EVEN,
            UPCAST,
            CANONICAL_NAN,
            SIZE,
            ROWS,
            COLUMNS,
            DEPTH,
            BAND,
        )


@jit
def _tile_top2(
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


class Groups(NamedTuple):
    """What the first launch leaves of each row and group of columns."""

    first_keys: Tensor
    """[B, G] int32: the largest key."""
    second_keys: Tensor
    """[B, G] int32: the largest key of its other parts; with a limit, how many members are above
    theirs."""
    rest: Tensor
    """[B, G] int32: 16 bits of an upper bound of all its other keys, then 8 bits each for the
    members that have the two above."""
    layout: Layout


def affine(b_enc: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """offset, scale [F] in fp32: (product + b_enc) * scale = product * scale + offset."""
    if scale is None:
        return b_enc.float(), None
    return b_enc.float() * scale.float(), scale.float()


def choose_tile(x: Tensor, W_enc: Tensor, limited: bool) -> Tile:
    """The tile of a product: the first of the table, or what a lesser GPU has memory for.

    fp32 weights beside half-precision rows take twice the memory of their part of the tile.
    """
    limited = limited or W_enc.element_size() > x.element_size()
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
    tile = choose_tile(x, W_enc, limit is not None)
    d_in, d_sae = W_enc.shape
    n_column_tiles = -(-d_sae // tile.columns)
    n_groups = n_column_tiles * (tile.columns // size)
    shape = len(x), n_groups
    first_keys = torch.empty(shape, dtype=torch.int32, device=x.device)
    second_keys, rest = torch.empty_like(first_keys), torch.empty_like(first_keys)
    descriptors = _takes_descriptors(x, W_enc)
    left, right = (x, W_enc) if not descriptors else _descriptors(x, W_enc, tile)
    n_programs = -(-len(x) // tile.rows) * n_column_tiles
    # Of an fp32 product the epilogue is too small a part.
    persistent = descriptors and x.dtype != torch.float32
    if persistent:
        properties = torch.cuda.get_device_properties(x.device)
        n_programs = min(n_programs, properties.multi_processor_count)
    with device_of(x):
        _group_top2[(n_programs,)](
            left,
            right,
            offset,
            offset if scale is None else scale,
            offset if limit is None else limit,
            first_keys,
            second_keys,
            rest,
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
            CANONICAL_NAN=x.is_cuda and not torch.version.hip,
            SIZE=size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            BAND=BAND,
            PERSISTENT=persistent,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return Groups(first_keys, second_keys, rest, Layout(tile.columns, size))


BAND = 16
"""Row tiles whose operands are read again while they are in L2."""


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


def _group_top2_spec(
    dtype: str,
    tile: Tile,
    size: int,
    descriptors: bool,
    default: bool = True,
    *,
    weight: str = "",
    note: str = "",
    **changed: bool,
) -> Spec:
    weight = weight or dtype
    operands = {"x": f"*{dtype}", "W_enc": f"*{weight}"}
    if descriptors:
        operands = {
            "x": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>",
            "W_enc": f"tensordesc<{weight}[{tile.columns},{tile.depth}]>",
        }
    keys = dict.fromkeys(("first_keys", "second_keys", "rest"), "*i32")
    sizes = dict.fromkeys(("n_rows", "d_in", "d_sae", "n_groups", "stride_x", "stride_f"), "i32")
    return Spec(
        f"topk.group_top2[{dtype}{f' by {weight}' if weight != dtype else ''}, "
        f"{'x'.join(map(str, tile))}, groups of {size}"
        f"{', descriptors' if descriptors else ''}]{f', {note}' if note else ''}",
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
            "CANONICAL_NAN": True,
            "SIZE": size,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "BAND": BAND,
            "PERSISTENT": descriptors and dtype != "fp32",
            **changed,
        },
        tile.num_warps,
        tile.num_stages,
        default=default,
    )


def specs() -> Iterator[Spec]:
    of = _group_top2_spec
    for dtype, tiles in (("bf16", HALF_TILES), ("fp32", FLOAT_TILES)):
        for number, tile in enumerate(tiles):
            for size in GROUP_SIZES:
                for descriptors in (False, True):
                    yield of(dtype, tile, size, descriptors, number == 0)
        tile = SMALL_TILE if dtype == "bf16" else tiles[0]
        for descriptors in (False, True):
            yield of(dtype, tiles[0], 64, descriptors, note="uneven", EVEN=False)
            yield of(dtype, tile, 64, descriptors, note="signed", EVEN=False, SIGNED=True)
            yield of(
                dtype, tile, 64, descriptors, note="limits", EVEN=False, SIGNED=True, LIMITED=True
            )
        yield of(dtype, tiles[0], 64, True, note="unscaled", SCALED=False)
    for descriptors in (False, True):
        yield of("fp16", HALF_TILES[0], 64, descriptors)
    yield of("bf16", SMALL_TILE, 64, True, weight="fp32", note="signed", SIGNED=True, SCALED=False)
    yield of("bf16", SMALL_TILE, 64, True, weight="fp32")
    yield of("fp32", FLOAT_TILES[0], 64, True, weight="bf16")
    yield of("bf16", HIP_TILE, 64, False)
