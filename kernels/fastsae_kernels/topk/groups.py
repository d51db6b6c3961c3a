"""Groups of columns and two of their largest keys: what every fused encode is made of.

`_group_top2` goes through the tiles of a matrix product whose epilogue (product.py) keeps, of each
row and group of columns, the largest key, the largest of the group's other parts, where both were,
and a bound of all the rest: 12 bytes for each row and group, 4.7 % of an fp32 [B, F] at groups of
64. What listed groups hold beside that is scored again (scores.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import UPCAST_DOTS, Spec, device_of, jit, padded
from fastsae_kernels.topk.keys import GROUP_SIZES, Layout
from fastsae_kernels.topk.product import tile_top2
from fastsae_kernels.topk.scores import by


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
            tile_top2(
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
        tile_top2(
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
        f"topk.group_top2[{dtype}{by(weight, dtype)}, "
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
