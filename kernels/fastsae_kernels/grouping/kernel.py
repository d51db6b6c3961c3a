"""Sums over each latent's pairs, in a fixed order, without atomics.

A latent with at most `CHUNK` pairs is summed by one program, rows ascending. A longer one would
keep one program busy while the rest of the GPU waits: its pairs are cut where the sorted pair list
crosses a multiple of `CHUNK`. Each window of `CHUNK` pairs is entered by at most one long latent
and left by at most one that began in it, so two fp32 partial sums a window are room enough
whatever the data, and no table of chunks has to be made. Slot 2w holds the latent that entered
window w, slot 2w + 1 the one that began in it; a latent's partials are added in ascending order.

Temporary memory: 2 * ceil(P / chunk) * D fp32 partial sums, 38 MB at P = 524,288, D = 2,304 (none
if there are at most `CHUNK` rows); the chunk grows with D / 8,192 so that wide rows take no more
than 134 MB per 524,288 pairs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.code import LatentGroups
from fastsae_kernels.grouping import row_sum

CHUNK = 256
"""Pairs that one program adds up."""

_SLICE_BYTES = 10 << 20
"""Of the operand, in the columns that programs which run together read: each row is read by tens of
latents, and the L2 cache of a data-centre GPU holds this much besides what streams through it."""

_LEAST_COLS, _MOST_COLS = 512, 2048
"""Of a program: fewer do not pay for reading the pairs' numbers, more take too many registers."""

_TILE_LATENTS, _TILE_PAIRS = 64, 16


def segment_sum(groups: LatentGroups, coef: Tensor, operand: Tensor) -> Tensor:
    """[F, D] fp32: for each latent the sum of coef[p] * operand[rows[p]] over its pairs p.

    Args:
        groups: F latents; a slice of `offsets` selects some of them.
        coef: [P], in the order of `groups.pairs`.
        operand: [B, D], fp32, bf16 or fp16.
    """
    n_latents, n_cols = groups.offsets.numel() - 1, operand.shape[1]
    out = operand.new_empty(n_latents, n_cols, dtype=torch.float32)
    if out.numel() == 0:
        return out
    pairs = pair_arguments(groups, coef, operand)
    cols, warps = _columns(n_cols, column_bytes(operand))
    with device_of(operand):
        _segment_sum_kernel[n_latents, cdiv(n_cols, cols)](
            out, *pairs, D=n_cols, COLS=cols, CHUNK=chunk_of(n_cols), num_warps=warps
        )
    return out


def segment_total(groups: LatentGroups, coef: Tensor) -> Tensor:
    """[F] fp32: for each latent the sum of coef[p] over its pairs p. `coef` is [P]."""
    n_latents, n_pairs = groups.offsets.numel() - 1, coef.numel()
    out = coef.new_empty(n_latents, dtype=torch.float32)
    if n_latents == 0:
        return out
    offsets, coef = groups.offsets.contiguous(), coef.contiguous()
    windows = cdiv(n_pairs, CHUNK)
    partials = coef.new_empty(2 * windows, dtype=torch.float32)
    with device_of(coef):
        if windows:
            _partial_totals_kernel[2 * windows,](
                partials, offsets, coef, n_latents, CHUNK=CHUNK, BLOCK=padded(CHUNK), num_warps=1
            )
        _segment_total_kernel[cdiv(n_latents, _TILE_LATENTS),](
            out,
            offsets,
            coef,
            partials,
            n_latents,
            CHUNK=CHUNK,
            LATENTS=_TILE_LATENTS,
            PAIRS=_TILE_PAIRS,
            num_warps=4,
        )
    return out


def chunk_of(n_cols: int) -> int:
    """Pairs in a window of rows that have `n_cols` columns."""
    return CHUNK * max(1, n_cols // 8192)


def pair_arguments(groups: LatentGroups, coef: Tensor, operand: Tensor) -> tuple[Any, ...]:
    """What `latent_sum` reads: offsets, rows, coef, operand and the partial sums of long latents.

    The partial sums are made here, or are None if no latent can have more than a chunk of pairs.
    """
    offsets, rows = groups.offsets.contiguous(), groups.rows.contiguous()
    coef, operand = coef.contiguous(), operand.contiguous()
    n_cols, chunk = operand.shape[1], chunk_of(operand.shape[1])
    if len(operand) <= chunk:
        return offsets, rows, coef, operand, None
    windows = cdiv(rows.numel(), chunk)
    partials = operand.new_empty(2 * windows, n_cols, dtype=torch.float32)
    cols, warps = _columns(n_cols, column_bytes(operand))
    with device_of(operand):
        _partial_sums_kernel[2 * windows, cdiv(n_cols, cols)](
            partials,
            offsets,
            rows,
            coef,
            operand,
            offsets.numel() - 1,
            D=n_cols,
            COLS=cols,
            CHUNK=chunk,
            num_warps=warps,
        )
    return offsets, rows, coef, operand, partials


def column_bytes(operand: Tensor) -> int:
    return len(operand) * operand.element_size()


def slice_columns(n_cols: int, column_bytes: int) -> int:
    """The columns of one program, a power of two, given the bytes of the operand's columns.

    Latents are to be the fast axis of the grid, blocks of columns the slow one. Of the sizes whose
    slice stays in L2, that with the fewest columns beyond `n_cols`, and the largest of those.
    """
    most = min(_MOST_COLS, padded(n_cols))
    cols = min(_LEAST_COLS, most)
    sizes = [cols]
    while 2 * cols <= most and 2 * cols * column_bytes <= _SLICE_BYTES:
        cols *= 2
        sizes.append(cols)
    return min(reversed(sizes), key=lambda cols: cdiv(n_cols, cols) * cols)


def _columns(n_cols: int, column_bytes: int) -> tuple[int, int]:
    """The columns of one program and its warps: 8 a thread."""
    cols = slice_columns(n_cols, column_bytes)
    return cols, max(1, cols // 256)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@jit
def columns_of(block, COLS: tl.constexpr):
    """[COLS] column numbers of a block.

    Four neighbours, no more, go to one thread: 16 bytes of fp32, 8 of bf16. Left alone, Triton
    gives a thread eight columns of bf16 and four of fp32 and moves every value between the two
    layouts through shared memory.
    """
    return block * COLS + tl.max_contiguous(tl.arange(0, COLS), 4)


@jit
def _add_pairs(acc, first, last, rows_ptr, coef_ptr, operand_ptr, columns, D: tl.constexpr):
    """acc + the sum of coef[p] * operand[rows[p], columns] over first <= p < last, ascending.

    Four at a time, all four row numbers before the first row, so that their latencies overlap.
    """
    inside = columns < D
    for p in range(first, last, 4):
        on1, on2, on3 = p + 1 < last, p + 2 < last, p + 3 < last
        row0 = tl.load(rows_ptr + p).to(tl.int64)
        row1 = tl.load(rows_ptr + p + 1, mask=on1, other=0).to(tl.int64)
        row2 = tl.load(rows_ptr + p + 2, mask=on2, other=0).to(tl.int64)
        row3 = tl.load(rows_ptr + p + 3, mask=on3, other=0).to(tl.int64)
        coef0 = tl.load(coef_ptr + p)
        coef1 = tl.load(coef_ptr + p + 1, mask=on1, other=0.0)
        coef2 = tl.load(coef_ptr + p + 2, mask=on2, other=0.0)
        coef3 = tl.load(coef_ptr + p + 3, mask=on3, other=0.0)
        x0 = tl.load(operand_ptr + row0 * D + columns, mask=inside, other=0.0)
        x1 = tl.load(operand_ptr + row1 * D + columns, mask=inside & on1, other=0.0)
        x2 = tl.load(operand_ptr + row2 * D + columns, mask=inside & on2, other=0.0)
        x3 = tl.load(operand_ptr + row3 * D + columns, mask=inside & on3, other=0.0)
        acc += coef0.to(tl.float32) * x0.to(tl.float32)
        acc += coef1.to(tl.float32) * x1.to(tl.float32)
        acc += coef2.to(tl.float32) * x2.to(tl.float32)
        acc += coef3.to(tl.float32) * x3.to(tl.float32)
    return acc


@jit
def latent_sum(
    latent,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    partials_ptr,
    columns,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32, like columns: the sum of coef[p] * operand[rows[p], columns] over a latent's pairs."""
    first, last = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    acc = tl.zeros(columns.shape, tl.float32)
    if partials_ptr is not None:
        split = last - first > CHUNK
        window = first // CHUNK
        stop = tl.where(split, (last - 1) // CHUNK + 1, window)
        inside = columns < D
        for w in range(window, stop, 2):
            # Two windows at a time; only the first can be the one that the latent begins in.
            began = (w * CHUNK < first).to(tl.int32)
            slot = (2 * w + began).to(tl.int64)
            next_slot = slot + 2 - began
            sum0 = tl.load(partials_ptr + slot * D + columns, mask=inside, other=0.0)
            sum1 = tl.load(
                partials_ptr + next_slot * D + columns, mask=inside & (w + 1 < stop), other=0.0
            )
            acc += sum0
            acc += sum1
        last = tl.where(split, first, last)
    return _add_pairs(acc, first, last, rows_ptr, coef_ptr, operand_ptr, columns, D)


@jit
def _long_part(slot, offsets_ptr, n_latents, CHUNK: tl.constexpr):
    """First pair and end of the long latent that a slot of partial sums is for; equal if none."""
    start = slot // 2 * CHUNK
    begins = slot % 2
    begin = tl.maximum(start, tl.load(offsets_ptr))
    end = tl.minimum(start + CHUNK, tl.load(offsets_ptr + n_latents))
    first, last = start, start
    if begin < end:
        pair = tl.where(begins == 0, begin, end - 1)
        low, high = begins * 0, n_latents
        while high - low > 1:
            middle = (low + high) // 2
            below = tl.load(offsets_ptr + middle) <= pair
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        first, last = tl.load(offsets_ptr + low), tl.load(offsets_ptr + low + 1)
        mine = (last - first > CHUNK) & ((first > start) == (begins == 1))
        first = tl.maximum(first, begin)
        last = tl.where(mine, tl.minimum(last, end), first)
    return first, last


@jit(do_not_specialize=["n_latents"])
def _partial_sums_kernel(
    partials_ptr,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    n_latents,
    D: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    slot = tl.program_id(0)
    first, last = _long_part(slot, offsets_ptr, n_latents, CHUNK)
    if first < last:
        columns = columns_of(tl.program_id(1), COLS)
        acc = tl.zeros([COLS], tl.float32)
        acc = _add_pairs(acc, first, last, rows_ptr, coef_ptr, operand_ptr, columns, D)
        tl.store(partials_ptr + slot.to(tl.int64) * D + columns, acc, mask=columns < D)


@jit
def _segment_sum_kernel(
    out_ptr,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    partials_ptr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    latent = tl.program_id(0)
    columns = columns_of(tl.program_id(1), COLS)
    acc = latent_sum(
        latent, offsets_ptr, rows_ptr, coef_ptr, operand_ptr, partials_ptr, columns, D, CHUNK
    )
    tl.store(out_ptr + latent.to(tl.int64) * D + columns, acc, mask=columns < D)


@jit(do_not_specialize=["n_latents"])
def _partial_totals_kernel(
    partials_ptr, offsets_ptr, coef_ptr, n_latents, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    slot = tl.program_id(0)
    first, last = _long_part(slot, offsets_ptr, n_latents, CHUNK)
    if first < last:
        pairs = first + tl.arange(0, BLOCK)
        coef = tl.load(coef_ptr + pairs, mask=pairs < last, other=0.0)
        tl.store(partials_ptr + slot, tl.sum(coef.to(tl.float32), 0))


@jit(do_not_specialize=["n_latents"])
def _segment_total_kernel(
    out_ptr,
    offsets_ptr,
    coef_ptr,
    partials_ptr,
    n_latents,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A tile of latents side by side: most have a few pairs, too few for a program of their own."""
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    live = latents < n_latents
    first = tl.load(offsets_ptr + latents, mask=live, other=0)
    last = tl.load(offsets_ptr + latents + 1, mask=live, other=0)
    window = first // CHUNK
    split = last - first > CHUNK
    n_windows = tl.where(split, (last - 1) // CHUNK + 1 - window, 0)
    n_pairs = tl.where(split, 0, last - first)
    lanes = tl.arange(0, PAIRS)[None, :]
    total = tl.zeros([LATENTS], tl.float32)
    for i in range(0, tl.max(n_windows, 0), PAIRS):
        w = window[:, None] + i + lanes
        slots = 2 * w + (w * CHUNK < first[:, None]).to(tl.int32)
        partials = tl.load(partials_ptr + slots, mask=i + lanes < n_windows[:, None], other=0.0)
        total += tl.sum(partials, 1)
    for i in range(0, tl.max(n_pairs, 0), PAIRS):
        pairs = first[:, None] + i + lanes
        coef = tl.load(coef_ptr + pairs, mask=i + lanes < n_pairs[:, None], other=0.0)
        total += tl.sum(coef.to(tl.float32), 1)
    tl.store(out_ptr + latents, total, mask=live)


SPEC_ROWS = 8192
"""Of the operand, in the configurations that are compiled ahead of time."""

PAIR_POINTERS = {"offsets_ptr": "*i32", "rows_ptr": "*i32", "coef_ptr": "*fp32"}


def specs() -> Iterator[Spec]:
    yield from row_sum.specs()
    total = {"offsets_ptr": "*i32", "coef_ptr": "*fp32", "n_latents": "i32"}
    yield Spec(
        "partial_totals",
        _partial_totals_kernel,
        {"partials_ptr": "*fp32", **total},
        {"CHUNK": CHUNK, "BLOCK": CHUNK},
        num_warps=1,
    )
    yield Spec(
        "segment_total",
        _segment_total_kernel,
        {"out_ptr": "*fp32", "partials_ptr": "*fp32", **total},
        {"CHUNK": CHUNK, "LATENTS": _TILE_LATENTS, "PAIRS": _TILE_PAIRS},
    )
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        for n_cols in (768, 2304, 4096, 100, 65536):
            cols, warps = _columns(n_cols, SPEC_ROWS * n_bytes)
            pointers = {**PAIR_POINTERS, "operand_ptr": f"*{dtype}", "partials_ptr": "*fp32"}
            sizes = {"D": n_cols, "COLS": cols, "CHUNK": chunk_of(n_cols)}
            default = dtype != "fp16" and n_cols in (768, 2304, 4096)
            name = f"{dtype} D={n_cols}"
            yield Spec(
                f"partial_sums {name}",
                _partial_sums_kernel,
                {**pointers, "n_latents": "i32"},
                sizes,
                num_warps=warps,
                default=default,
            )
            yield Spec(
                f"segment_sum {name}",
                _segment_sum_kernel,
                {**pointers, "out_ptr": "*fp32"},
                sizes,
                num_warps=warps,
                default=default,
            )
            yield Spec(
                f"segment_sum unsplit {name}",
                _segment_sum_kernel,
                {**PAIR_POINTERS, "operand_ptr": f"*{dtype}", "out_ptr": "*fp32"},
                {**sizes, "partials_ptr": None},
                num_warps=warps,
                default=False,
            )
