"""The weighted sum of a table's rows, a vector times a matrix, in a fixed order.

Bound by one pass over the table. It stands in for a library's product because there is none of an
fp32 vector with a bf16 matrix that would not make an fp32 copy of it. A program sums a block of
rows over a block of columns, which are the fast axis: programs that run together read memory from
end to end. Temporary memory: fp32 partial sums, at most `_MOST_BLOCKS` rows of them.
"""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded

TILE_BYTES, _COLS, _WARPS = 8 << 10, 512, 4
"""Of the table in one step of a program, its columns and warps."""

_LEAST_ROWS, _MOST_BLOCKS = 128, 1024


def weighted_row_sum(table: Tensor, weights: Tensor) -> Tensor:
    """[D] fp32: the sum of weights[j] * table[j] over the rows j of a table [F, D].

    A table whose rows are not contiguous is copied.
    """
    table, (n_rows, n_cols) = table.contiguous(), table.shape
    cols, tile_rows = _tile(n_cols, table.element_size())
    rows = max(_LEAST_ROWS, padded(-(-n_rows // _MOST_BLOCKS)))
    blocks = -(-n_rows // rows)
    partials = table.new_empty(blocks, n_cols, dtype=torch.float32)
    if partials.numel():
        with device_of(table):
            _row_sum_kernel[-(-n_cols // cols), blocks](
                partials,
                table,
                weights.contiguous(),
                n_rows,
                D=n_cols,
                ROWS=rows,
                TILE=tile_rows,
                COLS=cols,
                num_warps=_WARPS,
            )
    return partials.sum(0)


def _tile(n_cols: int, element_size: int) -> tuple[int, int]:
    """Columns and rows."""
    cols = min(_COLS, padded(n_cols))
    return cols, min(_LEAST_ROWS, TILE_BYTES // element_size // cols)


@jit(do_not_specialize=["n_rows"])
def _row_sum_kernel(
    partials_ptr,
    table_ptr,
    weights_ptr,
    n_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    columns = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = columns < D
    block = tl.program_id(1)
    acc = tl.zeros([TILE, COLS], tl.float32)
    for start in range(0, ROWS, TILE):
        rows = block * ROWS + start + tl.arange(0, TILE)
        live = rows < n_rows
        weight = tl.load(weights_ptr + rows, mask=live, other=0.0)
        values = tl.load(
            table_ptr + rows[:, None].to(tl.int64) * D + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += weight.to(tl.float32)[:, None] * values.to(tl.float32)
    tl.store(partials_ptr + block.to(tl.int64) * D + columns, tl.sum(acc, 0), mask=inside)


def specs() -> Iterator[Spec]:
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        for n_cols in (4096, 2304, 100):
            cols, tile_rows = _tile(n_cols, n_bytes)
            yield Spec(
                f"row_sum {dtype} D={n_cols}",
                _row_sum_kernel,
                {
                    "partials_ptr": "*fp32",
                    "table_ptr": f"*{dtype}",
                    "weights_ptr": "*fp32",
                    "n_rows": "i32",
                },
                {"D": n_cols, "ROWS": _LEAST_ROWS, "TILE": tile_rows, "COLS": cols},
                num_warps=_WARPS,
                default=dtype != "fp16" and n_cols == 4096,
            )
