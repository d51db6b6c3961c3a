"""`mse_l1_rows` of K <= `MOST_SLOTS` entries a row, with dots, in a single gather.

Decode and dots are both separable by columns: the error of a column needs that column alone of the
row's K rows of W_dec, and so does what it adds to their dot products. A program has one row, takes
the K rows block of columns by block, and keeps a block in registers from the one to the other.

Triton's pipeline copies the next blocks to shared memory meanwhile: with four programs on a
multiprocessor, which is what 128 registers a thread leave room for, 64 to 128 KB are under way, and
one program loads while another waits at the barriers of its sum over entries. Sums have a fixed
order: the same input gives the same bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded

MOST_SLOTS = 256
"""With more entries a block of `_LEAST_ROW_BYTES` would not fit the shared memory of every GPU."""

TILE_BYTES = 8192
"""Of W_dec in one block: the wider its rows the fewer barriers, but the fewer programs."""

STAGES = 3
"""Two blocks under way while one is computed on."""

# A line of the L2 cache: narrower pieces of a row would each fetch one.
_LEAST_ROW_BYTES = 128
# Wider blocks, of few entries, would leave too little to the pipeline.
_MOST_COLS = 1024
# 64 bf16 or 32 fp32 numbers a thread, which are in registers from the sum to the dot products.
_WARP_BYTES = 4096


class _Tile(NamedTuple):
    slots: int
    cols: int
    warps: int
    registers: int
    """Of a thread. At 168 a multiprocessor has room for 12 warps instead of 16."""


def launch(
    row_mse: Tensor,
    row_l1: Tensor,
    err: Tensor,
    dots: Tensor,
    x: Tensor,
    indices: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weight: Tensor | None,
) -> None:
    """Fills the first four, which `mse_l1_rows` returns, from its arguments.

    The elements of a row of x and of W_dec lie side by side; `indices` is [B, K].
    """
    n_slots, n_cols = indices.shape[1], W_dec.shape[1]
    tile = _tile(n_slots, n_cols, W_dec.element_size())
    limit = {} if torch.version.hip else {"maxnreg": tile.registers}
    with device_of(W_dec):
        _mse_l1_one_visit_kernel[len(x),](
            row_mse,
            row_l1,
            err,
            dots,
            x,
            indices.contiguous(),
            acts.contiguous(),
            W_dec,
            b_dec.contiguous(),
            None if l1_weight is None else l1_weight.contiguous(),
            n_slots,
            n_cols,
            x.stride(0),
            W_dec.stride(0),
            SLOTS=tile.slots,
            COLS=tile.cols,
            VECTOR=16 // W_dec.element_size(),
            STAGES=STAGES,
            num_warps=tile.warps,
            **limit,
        )


def _tile(n_slots: int, n_cols: int, element_size: int) -> _Tile:
    slots = padded(n_slots, 1)
    row_bytes = max(_LEAST_ROW_BYTES, TILE_BYTES // slots)
    cols = min(row_bytes // element_size, _MOST_COLS, padded(n_cols))
    warps = max(1, slots * cols * element_size // _WARP_BYTES, cols // 256)
    # Short rows lie on few lanes, and the sum over entries then goes through the others.
    return _Tile(slots, cols, warps, 128 if cols * element_size >= 256 else 168)


@jit(do_not_specialize=["n_slots"])
def _mse_l1_one_visit_kernel(
    row_mse_ptr,
    row_l1_ptr,
    err_ptr,
    dots_ptr,
    x_ptr,
    indices_ptr,
    acts_ptr,
    weight_ptr,
    bias_ptr,
    l1_weight_ptr,
    n_slots,
    n_cols,
    x_stride,
    stride,
    SLOTS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    err_ptr += row * n_cols
    # Slots from n_slots on do not exist. Their rows are not read at all, since 0 times a NaN would
    # count.
    slot = tl.arange(0, SLOTS)
    exists = slot < n_slots
    index = tl.load(indices_ptr + row * n_slots + slot, mask=exists, other=0).to(tl.int64)
    act = tl.load(acts_ptr + row * n_slots + slot, mask=exists, other=0.0).to(tl.float32)
    row_ptr = weight_ptr + (index * stride)[:, None]

    squares = tl.zeros([COLS], tl.float32)
    dots = tl.zeros([SLOTS, COLS // VECTOR], tl.float32)
    # Two bytes a thread are too few for the pipeline, so these are loaded a block ahead by hand.
    next_col = tl.arange(0, COLS)
    next_x = tl.load(x_ptr + next_col, mask=next_col < n_cols, other=0.0)
    next_bias = tl.load(bias_ptr + next_col, mask=next_col < n_cols, other=0.0)
    for start in tl.range(0, n_cols, COLS, num_stages=STAGES):
        col = start + tl.arange(0, COLS)
        live = col < n_cols
        x, bias = next_x.to(tl.float32), next_bias.to(tl.float32)
        next_x = tl.load(x_ptr + col + COLS, mask=col + COLS < n_cols, other=0.0)
        next_bias = tl.load(bias_ptr + col + COLS, mask=col + COLS < n_cols, other=0.0)

        rows = tl.load(row_ptr + col[None, :], mask=exists[:, None] & live[None, :], other=0.0)
        rows = rows.to(tl.float32)
        # An infinite act makes NaN, not 0, of the columns that do not exist.
        err = tl.where(live, tl.sum(act[:, None] * rows, 0) + bias - x, 0.0)
        tl.store(err_ptr + col, err, mask=live)
        squares += err * err
        # The VECTOR numbers of one load are summed at once, for the sake of the registers.
        terms = rows * err[None, :]
        dots += tl.sum(tl.reshape(terms, [SLOTS, COLS // VECTOR, VECTOR]), 2)
    tl.store(row_mse_ptr + row, tl.sum(squares))
    tl.store(dots_ptr + row * n_slots + slot, tl.sum(dots, 1), mask=exists)

    # Loaded again rather than kept in registers until now.
    size = tl.abs(tl.load(acts_ptr + row * n_slots + slot, mask=exists, other=0.0).to(tl.float32))
    if l1_weight_ptr is not None:
        index = tl.load(indices_ptr + row * n_slots + slot, mask=exists, other=0)
        size *= tl.load(l1_weight_ptr + index, mask=exists, other=0.0).to(tl.float32)
    tl.store(row_l1_ptr + row, tl.sum(size))


def specs() -> Iterator[Spec]:
    floats = ("row_mse_ptr", "row_l1_ptr", "err_ptr", "dots_ptr", "acts_ptr", "bias_ptr")
    shared = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("n_cols", "x_stride", "stride"), "i32")
    shared |= {"indices_ptr": "*i32", "n_slots": "i32"}
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        types = shared | {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
        for n_slots in (64, 1, 8, 32, 128, MOST_SLOTS):
            tile = _tile(n_slots, 4096, n_bytes)
            sizes = {"SLOTS": tile.slots, "COLS": tile.cols, "VECTOR": 16 // n_bytes}
            for weighted in (False, True):
                yield Spec(
                    f"mse_l1 one visit {'weighted ' * weighted}{dtype} {tile.slots}x{tile.cols}",
                    _mse_l1_one_visit_kernel,
                    types | ({"l1_weight_ptr": "*fp32"} if weighted else {}),
                    sizes | {"STAGES": STAGES} | ({} if weighted else {"l1_weight_ptr": None}),
                    num_warps=tile.warps,
                    max_registers=tile.registers,
                    default=dtype != "fp16" and n_slots == 64,
                )
