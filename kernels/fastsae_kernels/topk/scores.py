"""Groups of columns scored again, each product summed as `_group_top2` rounds its operands."""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit
from fastsae_kernels.topk.keys import LOWEST, Layout, column, keys_from

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
AOT_TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
SCORING_PROGRAMS = 2048
"""How many groups are listed only the device knows: so many programs share them."""
WIDENED_REGISTERS = 128
"""Of half-precision rows by fp32 weights, where the compiler by itself stops at 96 and spills."""


@jit
def score(
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
    for start in tl.range(0, d_in, DEPTH, num_stages=3):
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
    return tl.where(inside, keys_from(products, SIGNED), LOWEST)


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
    members = tl.arange(0, SIZE)[None, :]
    for number in range(tl.program_id(0), tl.load(n_listed), tl.num_programs(0)):
        row = tl.load(rows + number).to(tl.int64)
        columns = column(tl.load(groups + number), members, SIZE, COLUMNS)
        found = score(
            x + row * stride_x + tl.zeros((1, 1), tl.int32),
            W_enc,
            offset,
            scale,
            columns,
            columns < d_sae,
            d_in,
            stride_d,
            stride_f,
            SCALED,
            SIGNED,
            PRODUCT,
            DEPTH,
        )
        tl.store(keys + (tl.zeros((1, 1), tl.int64) + number) * SIZE + members, found)


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

    Columns that do not exist get the lowest key; pairs beyond are not written.
    """
    if len(rows) == 0:
        return
    widened = W_enc.element_size() > x.element_size()
    with device_of(x):
        _score_groups[(min(len(rows), SCORING_PROGRAMS),)](
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
            PRODUCT=TRITON_TYPES[x.dtype],
            SIZE=layout.size,
            COLUMNS=layout.columns,
            DEPTH=4096 // layout.size,
            num_warps=4,
            **({"maxnreg": WIDENED_REGISTERS} if widened and not torch.version.hip else {}),
        )


def by(weight: str, dtype: str) -> str:
    """Of a spec's name: weights that have another dtype than the rows."""
    return "" if weight == dtype else f" by {weight}"


def specs() -> Iterator[Spec]:
    for dtype in ("bf16", "fp32", "fp16"):
        yield _score_spec(dtype, dtype)
    yield _score_spec("bf16", "fp32", ", signed, unscaled", SCALED=False, SIGNED=True)


def _score_spec(dtype: str, weight: str, note: str = "", **changed: bool) -> Spec:
    pointers = {"x": f"*{dtype}", "W_enc": f"*{weight}", "offset": "*fp32", "scale": "*fp32"}
    pointers |= {"rows": "*i32", "groups": "*i32", "n_listed": "*i32", "keys": "*i32"}
    return Spec(
        f"topk.score_groups[{dtype}{by(weight, dtype)}{note}]",
        _score_groups,
        {**pointers, **dict.fromkeys(("d_in", "d_sae", "stride_x", "stride_f"), "i32")},
        {
            "stride_d": 1,
            "SCALED": True,
            "SIGNED": False,
            "PRODUCT": AOT_TYPES[dtype],
            "SIZE": 64,
            "COLUMNS": 256,
            "DEPTH": 64,
            **changed,
        },
        max_registers=WIDENED_REGISTERS if weight != dtype else None,
    )
