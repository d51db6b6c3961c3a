"""Squared error, L1 and the gradient of the activations, one program a row.

With up to `MOST_SLOTS` entries in every row each row of W_dec is read once (`one_visit.py`). The
kernel here takes more of them, rows whose lengths are on the device only, and calls without dots.

It decodes its row block by block, writes the error, and goes through the same rows of W_dec once
more for their dot products with it, in the opposite direction: what was read last may still be in
cache. For that few rows may be under way, hence many warps on each: at 16 warps of 64 registers a
multiprocessor works at two rows, 2 x 295 KB of a bf16 W_dec at K = 64, D = 2,304.

The error is read back from where it was written, which is its output, so that no D is too long for
the registers. Nothing is allocated but the outputs. Sums have a fixed order: the same input gives
the same bits.
"""

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.decode.kernel import (
    DOT_SLOTS,
    DOT_WARPS,
    ROW_BYTES,
    add_rows,
    check_weight_rows,
    code_arguments,
    offsets_argument,
    row_span,
    slot_dots,
    slots_of,
    warp_cols,
    with_close_cols,
)
from fastsae_kernels.loss import one_visit
from fastsae_kernels.loss.one_visit import MOST_SLOTS

BLOCK_BYTES = 2048
"""Of a row of W_dec that is decoded at a time; so the warps read several rows side by side."""

# Entries in flight, with dots and without: what fits into 64 registers a thread without spilling.
_DEPTH, _DEPTH_ALONE = 4, 8


def mse_l1_rows(
    x: Tensor,
    row_offsets: Tensor | None,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
    needs_dots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of each row, and what their gradients are made of.

    With err[b] = sum over row b's entries of act * W_dec[index] + b_dec - x[b]. The gradient of
    row b's squared error with respect to its activations is 2 * dots.

    Args:
        x: [B, D]; copied if the elements of a row are not side by side.
        row_offsets: [B + 1] of a ragged code, int32, or None for K entries a row.
        indices: [nnz] or [B, K], int32 or int64.
        acts: like indices.
        W_dec: [F, D], a row's elements side by side; any stride between rows.
        b_dec: [D].
        l1_weight: [F], or None for ones.
        needs_dots: whether to make `dots`; else it comes back empty.

    Returns:
        All fp32: row_mse [B] = |err[b]|^2, row_l1 [B] = sum of |act| * l1_weight[index],
        err [B, D], dots like acts = err[b] . W_dec[index].

    Raises:
        ValueError: the elements of a row of `W_dec` are not side by side.
    """
    check_weight_rows(W_dec)
    n_rows, n_cols = x.shape
    row_mse = x.new_empty(n_rows, dtype=torch.float32)
    row_l1 = torch.empty_like(row_mse)
    err = x.new_empty(n_rows, n_cols, dtype=torch.float32)
    dots = acts.new_empty(acts.shape if needs_dots else 0, dtype=torch.float32)
    if n_rows == 0:
        return row_mse, row_l1, err, dots
    x = with_close_cols(x)
    if needs_dots and row_offsets is None and indices.shape[1] <= MOST_SLOTS:
        one_visit.launch(row_mse, row_l1, err, dots, x, indices, acts, W_dec, b_dec, l1_weight)
        return row_mse, row_l1, err, dots
    groups, cols = _decode_tile(n_cols, W_dec.element_size())
    with device_of(W_dec):
        _mse_l1_kernel[n_rows,](
            row_mse,
            row_l1,
            err,
            dots if needs_dots else None,
            x,
            offsets_argument(row_offsets),
            indices.contiguous(),
            acts.contiguous(),
            W_dec,
            b_dec.contiguous(),
            None if l1_weight is None else l1_weight.contiguous(),
            slots_of(row_offsets, indices),
            n_cols,
            x.stride(0),
            W_dec.stride(0),
            GROUPS=groups,
            DEPTH=_DEPTH if needs_dots else _DEPTH_ALONE,
            COLS=cols,
            SLOTS=DOT_SLOTS,
            DOT_COLS=warp_cols(W_dec),
            VECTOR=16 // W_dec.element_size(),
            num_warps=DOT_WARPS,
        )
    return row_mse, row_l1, err, dots


def _decode_tile(n_cols: int, element_size: int) -> tuple[int, int]:
    """How many entries the warps decode side by side, and how many columns of each."""
    cols = min(BLOCK_BYTES // element_size, padded(n_cols))
    return min(DOT_WARPS, DOT_WARPS * ROW_BYTES // element_size // cols), cols


@jit(do_not_specialize=["n_slots"])
def _mse_l1_kernel(
    row_mse_ptr,
    row_l1_ptr,
    err_ptr,
    dots_ptr,
    x_ptr,
    row_offsets_ptr,
    indices_ptr,
    acts_ptr,
    weight_ptr,
    bias_ptr,
    l1_weight_ptr,
    n_slots,
    n_cols,
    x_stride,
    stride,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
    DOT_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    first, count = row_span(row_offsets_ptr, row, n_slots)
    indices_ptr += first
    acts_ptr += first
    x_ptr += row.to(tl.int64) * x_stride
    err_ptr += row.to(tl.int64) * n_cols

    squares = tl.zeros([COLS], tl.float32)
    for start in range(0, n_cols, COLS):
        col = start + tl.arange(0, COLS)
        live = col < n_cols
        acc = tl.zeros([GROUPS, COLS], tl.float32)
        for k in range(0, count, GROUPS * DEPTH):
            for step in tl.static_range(DEPTH):
                acc = add_rows(
                    acc,
                    k + step * GROUPS + tl.arange(0, GROUPS),
                    count,
                    indices_ptr,
                    acts_ptr,
                    weight_ptr + col[None, :],
                    stride,
                    live[None, :],
                    1,
                )
        bias = tl.load(bias_ptr + col, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + col, mask=live, other=0.0).to(tl.float32)
        err = tl.sum(acc, 0) + bias - x
        tl.store(err_ptr + col, err, mask=live)
        # An infinite act makes NaN, not 0, of the columns that do not exist.
        squares += tl.where(live, err * err, 0.0)
    tl.store(row_mse_ptr + row, tl.sum(squares))

    l1 = tl.zeros([SLOTS], tl.float32)
    for k in range(0, count, SLOTS):
        slot = k + tl.arange(0, SLOTS)
        size = tl.abs(tl.load(acts_ptr + slot, mask=slot < count, other=0.0).to(tl.float32))
        if l1_weight_ptr is not None:
            index = tl.load(indices_ptr + slot, mask=slot < count, other=0)
            size *= tl.load(l1_weight_ptr + index, mask=slot < count, other=0.0).to(tl.float32)
        l1 += size
    tl.store(row_l1_ptr + row, tl.sum(l1))

    if dots_ptr is not None:
        # The threads that read err are not those that wrote it.
        tl.debug_barrier()
        for k in range(0, count, SLOTS):
            slot = k + tl.arange(0, SLOTS)
            dots = slot_dots(
                slot,
                count,
                err_ptr,
                indices_ptr,
                weight_ptr,
                n_cols,
                stride,
                SLOTS,
                DOT_COLS,
                VECTOR,
            )
            tl.store(dots_ptr + first + slot, dots, mask=slot < count)


def specs() -> Iterator[Spec]:
    yield from one_visit.specs()
    floats = ("row_mse_ptr", "row_l1_ptr", "err_ptr", "dots_ptr", "acts_ptr", "bias_ptr")
    shared = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("n_cols", "x_stride", "stride"), "i32")
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        for ragged in (False, True):
            code, no_code = code_arguments(ragged)
            for n_cols in (4096, 33):
                groups, cols = _decode_tile(n_cols, n_bytes)
                types = code | shared | {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
                tile = {
                    "GROUPS": groups,
                    "DEPTH": _DEPTH,
                    "COLS": cols,
                    "SLOTS": DOT_SLOTS,
                    "DOT_COLS": min(ROW_BYTES // n_bytes, cols),
                    "VECTOR": 16 // n_bytes,
                }
                name = f"{dtype} {'ragged' if ragged else 'fixed'} cols={cols}"
                absent = {"l1_weight_ptr": None, "dots_ptr": None, "DEPTH": _DEPTH_ALONE}
                default = dtype != "fp16" and n_cols == 4096
                yield Spec(
                    f"mse_l1 {name}",
                    _mse_l1_kernel,
                    types,
                    no_code | tile | {"l1_weight_ptr": None},
                    num_warps=DOT_WARPS,
                    default=default,
                )
                yield Spec(
                    f"mse_l1 weighted {name}",
                    _mse_l1_kernel,
                    types | {"l1_weight_ptr": "*fp32"},
                    no_code | tile,
                    num_warps=DOT_WARPS,
                    default=default,
                )
                yield Spec(
                    f"mse_l1 without dots {name}",
                    _mse_l1_kernel,
                    {k: v for k, v in types.items() if k != "dots_ptr"},
                    no_code | tile | absent,
                    num_warps=DOT_WARPS,
                    default=default,
                )
