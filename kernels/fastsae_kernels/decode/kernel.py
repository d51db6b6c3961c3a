"""Sums of, and dot products with, the rows of a dictionary that a code names.

Bound by the memory traffic of the gather: each named row is read once, 16 bytes a thread, into
fp32 sums that stay in registers. Nothing is allocated but the output. Sums have a fixed order: the
same input gives the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded

ROW_BYTES = 512
"""Of one row in a warp's load: 32 threads of 16 bytes. Narrower rows take what they have."""

DOT_SLOTS, DOT_WARPS = 64, 16
"""Entries whose dot products one program makes at a time, four a warp. With fewer warps Triton
carries the dense operand through shared memory, with barriers in the inner loop."""

_ROWS, _DEPTH = 4, 8


def gather_sum(
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """[B, D] fp32: the sum over each row's entries of act * weight[index], plus bias.

    Args:
        row_offsets: [B + 1] of a ragged code, int32, or None for K entries a row.
        indices: [nnz] or [B, K], int32 or int64.
        acts: like indices.
        weight: [F, D], a row's elements side by side; any stride between rows.
        bias: [D] or None.

    Raises:
        ValueError: the elements of a row of `weight` are not side by side.
    """
    check_weight_rows(weight)
    n_rows = len(indices) if row_offsets is None else len(row_offsets) - 1
    n_cols = weight.shape[1]
    x_hat = weight.new_empty(n_rows, n_cols, dtype=torch.float32)
    if n_rows == 0:
        return x_hat
    cols = warp_cols(weight)
    # Blocks of columns are the slow axis: the programs that run together read one block of the
    # dictionary, which the L2 cache then holds, instead of all of it.
    grid = (triton.cdiv(n_rows, _ROWS), triton.cdiv(n_cols, cols))
    with device_of(weight):
        _gather_sum_kernel[grid](
            x_hat,
            offsets_argument(row_offsets),
            indices.contiguous(),
            acts.contiguous(),
            weight,
            None if bias is None else bias.contiguous(),
            n_rows,
            slots_of(row_offsets, indices),
            n_cols,
            weight.stride(0),
            ROWS=_ROWS,
            DEPTH=_DEPTH,
            COLS=cols,
        )
    return x_hat


def pair_dots(row_offsets: Tensor | None, indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Like indices, fp32: rows[b] . weight[index] for every entry of row b.

    Args:
        row_offsets: [B + 1] of a ragged code, int32, or None for K entries a row.
        indices: [nnz] or [B, K], int32 or int64.
        rows: [B, D]; copied if the elements of a row are not side by side.
        weight: [F, D], a row's elements side by side; any stride between rows.

    Raises:
        ValueError: the elements of a row of `weight` are not side by side.
    """
    check_weight_rows(weight)
    dots = weight.new_empty(indices.shape, dtype=torch.float32)
    if dots.numel() == 0:
        return dots
    n_slots, rows = slots_of(row_offsets, indices), with_close_cols(rows)
    # A ragged row has one program: how long the longest one is only the device knows.
    grid = (len(rows), max(1, triton.cdiv(n_slots, DOT_SLOTS)))
    with device_of(weight):
        _pair_dots_kernel[grid](
            dots,
            offsets_argument(row_offsets),
            indices.contiguous(),
            rows,
            weight,
            n_slots,
            weight.shape[1],
            rows.stride(0),
            weight.stride(0),
            SLOTS=DOT_SLOTS,
            COLS=warp_cols(weight),
            VECTOR=16 // weight.element_size(),
            num_warps=DOT_WARPS,
        )
    return dots


def check_weight_rows(weight: Tensor) -> None:
    # Not copied here: it would be the whole dictionary, at every call.
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            "W_dec must hold the elements of each row side by side (stride(1) == 1), got strides "
            f"{weight.stride()} for shape {list(weight.shape)}; pass W_dec.contiguous()"
        )


def with_close_cols(rows: Tensor) -> Tensor:
    """`rows` itself if its rows' elements are side by side, else a copy of which that is true."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def slots_of(row_offsets: Tensor | None, indices: Tensor) -> int:
    """K, or 0 for a ragged code."""
    return indices.shape[1] if row_offsets is None else 0


def offsets_argument(row_offsets: Tensor | None) -> Tensor | None:
    """Always int32: with int64 offsets Triton 3.6 and 3.7 fail to compile `_gather_sum_kernel`."""
    return None if row_offsets is None else row_offsets.int().contiguous()


def warp_cols(weight: Tensor) -> int:
    """Columns that one warp loads of a row."""
    return min(ROW_BYTES // weight.element_size(), padded(weight.shape[1]))


@jit
def row_span(row_offsets_ptr, row, n_slots):
    """Where the entries of a row (or of several) begin, in int64, and how many there are."""
    if row_offsets_ptr is None:
        return row.to(tl.int64) * n_slots, n_slots
    else:
        first = tl.load(row_offsets_ptr + row).to(tl.int64)
        return first, (tl.load(row_offsets_ptr + row + 1) - first).to(tl.int32)


@jit
def add_rows(
    acc, slot, n_slots, indices_ptr, acts_ptr, weight_ptr, stride, col_live, DEPTH: tl.constexpr
):
    """acc [R, C] plus the sum over d of act * row of the entries slot [d * R + r] of row r.

    Slots from n_slots on do not exist. Their rows are not read at all, since 0 times a NaN would
    count. `weight_ptr` and `col_live` are [1, C].
    """
    live = slot < n_slots
    index = tl.load(indices_ptr + slot, mask=live, other=0).to(tl.int64)
    act = tl.load(acts_ptr + slot, mask=live, other=0.0).to(tl.float32)
    rows = tl.load(weight_ptr + (index * stride)[:, None], mask=live[:, None] & col_live, other=0.0)
    terms = act[:, None] * rows.to(tl.float32)
    return acc + tl.sum(tl.reshape(terms, [DEPTH, acc.shape[0], acc.shape[1]]), 0)


@jit
def slot_dots(
    slot,
    n_slots,
    dense_ptr,
    indices_ptr,
    weight_ptr,
    n_cols,
    stride,
    SLOTS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """[SLOTS] fp32: dense row . weight row of the entries `slot`.

    Runs from the last columns to the first, so that a caller who has just been through them meets
    those that are still in cache. The VECTOR numbers of one load are summed at once: an accumulator
    for each of them would take the registers of half the warps.
    """
    live = slot < n_slots
    index = tl.load(indices_ptr + slot, mask=live, other=0).to(tl.int64)
    row_ptr = weight_ptr + (index * stride)[:, None]
    last = tl.cdiv(n_cols, COLS) - 1
    acc = tl.zeros([SLOTS, COLS // VECTOR], tl.float32)
    for block in range(0, last + 1):
        col = ((last - block) * COLS + tl.arange(0, COLS))[None, :]
        dense = tl.load(dense_ptr + col, mask=col < n_cols, other=0.0).to(tl.float32)
        rows = tl.load(row_ptr + col, mask=live[:, None] & (col < n_cols), other=0.0)
        terms = rows.to(tl.float32) * dense
        acc += tl.sum(tl.reshape(terms, [SLOTS, COLS // VECTOR, VECTOR]), 2)
    return tl.sum(acc, 1)


@jit(do_not_specialize=["n_rows", "n_slots"])
def _gather_sum_kernel(
    x_hat_ptr,
    row_offsets_ptr,
    indices_ptr,
    acts_ptr,
    weight_ptr,
    bias_ptr,
    n_rows,
    n_slots,
    n_cols,
    stride,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """A warp has one of ROWS rows and DEPTH of its entries in flight."""
    first_row = tl.program_id(0) * ROWS
    entry = tl.arange(0, DEPTH * ROWS)
    owner = tl.minimum(first_row + entry % ROWS, n_rows - 1)
    first, count = row_span(row_offsets_ptr, owner, n_slots)
    longest = n_slots if row_offsets_ptr is None else tl.max(count)
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    live = col < n_cols
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(0, longest, DEPTH):
        acc = add_rows(
            acc,
            k + entry // ROWS,
            count,
            indices_ptr + first,
            acts_ptr + first,
            weight_ptr + col,
            stride,
            live,
            DEPTH,
        )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=live, other=0.0).to(tl.float32)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    tl.store(x_hat_ptr + row.to(tl.int64) * n_cols + col, acc, mask=(row < n_rows) & live)


@jit(do_not_specialize=["n_slots"])
def _pair_dots_kernel(
    dots_ptr,
    row_offsets_ptr,
    indices_ptr,
    rows_ptr,
    weight_ptr,
    n_slots,
    n_cols,
    row_stride,
    stride,
    SLOTS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    first, count = row_span(row_offsets_ptr, row, n_slots)
    for k in range(tl.program_id(1) * SLOTS, count, tl.num_programs(1) * SLOTS):
        slot = k + tl.arange(0, SLOTS)
        dots = slot_dots(
            slot,
            count,
            rows_ptr + row.to(tl.int64) * row_stride,
            indices_ptr + first,
            weight_ptr,
            n_cols,
            stride,
            SLOTS,
            COLS,
            VECTOR,
        )
        tl.store(dots_ptr + first + slot, dots, mask=slot < count)


def code_arguments(ragged: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Types of the arguments that are a code, and those that are None, for a `Spec`."""
    types = {"indices_ptr": "*i32", "n_slots": "i32"}
    if ragged:
        return types | {"row_offsets_ptr": "*i32"}, {}
    return types, {"row_offsets_ptr": None}


def specs() -> Iterator[Spec]:
    sizes = {"n_cols": "i32", "stride": "i32"}
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        for ragged in (False, True):
            code, no_code = code_arguments(ragged)
            for cols in (ROW_BYTES // n_bytes, 64):
                default = dtype != "fp16" and cols != 64
                name = f"{dtype} {'ragged' if ragged else 'fixed'} cols={cols}"
                sums = {"x_hat_ptr": "*fp32", "acts_ptr": "*fp32", "weight_ptr": f"*{dtype}"}
                tile = {"ROWS": _ROWS, "DEPTH": _DEPTH, "COLS": cols}
                yield Spec(
                    f"gather_sum {name}",
                    _gather_sum_kernel,
                    code | sums | sizes | {"bias_ptr": "*fp32", "n_rows": "i32"},
                    no_code | tile,
                    default=default,
                )
                yield Spec(
                    f"gather_sum without bias {name}",
                    _gather_sum_kernel,
                    code | sums | sizes | {"n_rows": "i32"},
                    no_code | tile | {"bias_ptr": None},
                    default=default,
                )
                dots = {"dots_ptr": "*fp32", "rows_ptr": "*fp32", "weight_ptr": f"*{dtype}"}
                yield Spec(
                    f"pair_dots {name}",
                    _pair_dots_kernel,
                    code | dots | sizes | {"row_stride": "i32"},
                    no_code | {"SLOTS": DOT_SLOTS, "COLS": cols, "VECTOR": 16 // n_bytes},
                    num_warps=DOT_WARPS,
                    default=default,
                )
