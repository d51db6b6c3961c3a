"""The update of a dictionary's rows, their gradients summed in registers.

A program has a block of a row's columns, and rows are the grid's fast axis: what runs together
gathers from one slice of the operand, which stays in L2, so that memory streams weight and moments
alone. Projection and unit norm need sums over a row: there a program has all of its columns.

Traffic a parameter: weight and moments read and written, 24 bytes (16 with bf16 moments), and 2 for
a bf16 copy, once, besides the gather of the gradient's operand. Temporary memory: the partial sums
of `grouping/kernel.py`, and what `merge.py` copies if there are several gradients.

Rows that are too wide, and biases without pairs, go to `blocks.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._row_grads import RowGrad
from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.grouping.kernel import (
    PAIR_POINTERS,
    SPEC_ROWS,
    cdiv,
    chunk_of,
    column_bytes,
    columns_of,
    latent_sum,
    pair_arguments,
    slice_columns,
)
from fastsae_kernels.optimizer.blocks import update_blocks
from fastsae_kernels.optimizer.merge import MergedGrad, merge, touched_rows
from fastsae_kernels.optimizer.update import RowState, Rule

MAX_COLUMNS = 8192


def row_adam(state: RowState, grads: Sequence[RowGrad], rule: Rule) -> None:
    merged = merge(grads, len(state.weight))
    if _by_blocks(state.weight, merged, rule):
        update_blocks(state, merged, rule, None)
    else:
        _update(state, merged, rule, lazy=False)


def lazy_row_adam(state: RowState, grads: Sequence[RowGrad], rule: Rule) -> None:
    merged = merge(grads, len(state.weight))
    if _by_blocks(state.weight, merged, rule):
        update_blocks(state, merged, rule, touched_rows(grads, len(state.weight)))
    else:
        _update(state, merged, rule, lazy=True)


def row_grad_norm(weight: Tensor, grads: Sequence[RowGrad]) -> Tensor:
    merged = merge(grads, len(weight))
    if merged.pairs is None:
        values = weight.new_zeros(()) if merged.values is None else merged.values
        return torch.linalg.vector_norm(values, dtype=torch.float32)
    n_rows, n_cols = weight.shape
    cols = slice_columns(n_cols, column_bytes(merged.pairs.operand))
    blocks = cdiv(n_cols, cols)
    squares = weight.new_empty(blocks, n_rows, dtype=torch.float32)
    with device_of(weight):
        _row_squares_kernel[n_rows, blocks](
            squares,
            *_gradient_arguments(merged),
            D=n_cols,
            COLS=cols,
            CHUNK=chunk_of(n_cols),
            num_warps=max(1, cols // 256),
        )
    return squares.sum().sqrt()


def _by_blocks(weight: Tensor, merged: MergedGrad, rule: Rule) -> bool:
    too_wide = weight.shape[1] > MAX_COLUMNS and (rule.project or rule.renormalise)
    return too_wide or (weight.shape[1] == 1 and merged.pairs is None)


def _update(state: RowState, merged: MergedGrad, rule: Rule, lazy: bool) -> None:
    n_rows, n_cols = state.weight.shape
    if state.weight.numel() == 0:
        return
    operand_bytes = 0 if merged.pairs is None else column_bytes(merged.pairs.operand)
    cols, warps, registers = _shape(n_cols, operand_bytes, rule.project or rule.renormalise)
    limit = {} if registers is None or torch.version.hip else {"maxnreg": registers}
    with device_of(state.weight):
        _row_adam_kernel[n_rows, cdiv(n_cols, cols)](
            *state,
            *_gradient_arguments(merged),
            None if rule.grad_scale is None else rule.grad_scale.to(state.weight.device),
            rule.step,
            *_factors(rule),
            D=n_cols,
            COLS=cols,
            CHUNK=chunk_of(n_cols),
            PROJECT=rule.project,
            RENORMALISE=rule.renormalise,
            LAZY=lazy,
            num_warps=warps,
            **limit,
        )


def _factors(rule: Rule) -> tuple[float, ...]:
    """step_size, decay1, gain1, decay2, gain2, correction2, eps: made in fp64, passed in fp32."""
    (b1, b2), step = map(float, rule.betas), rule.step
    correction = 1 - b2**step
    return rule.lr / (1 - b1**step), b1, 1 - b1, b2, 1 - b2, correction**-0.5, float(rule.eps)


def _gradient_arguments(merged: MergedGrad) -> tuple[Any, ...]:
    """What `_gradient` reads."""
    pairs, values, table = merged
    if pairs is None:
        return *[None] * 5, values, table
    return *pair_arguments(pairs.groups, pairs.coef, pairs.operand), values, table


def _shape(n_cols: int, column_bytes: int, whole: bool) -> tuple[int, int, int | None]:
    """The columns of a program, its warps, and the registers of a thread.

    A thread has eight columns of a block at least, twelve of a whole row: they share its addresses
    and masks, so that registers leave room for more programs on a multiprocessor (docs/kernels.md
    has their numbers) and more bytes are on their way at a time.
    """
    cols = padded(n_cols) if whole else slice_columns(n_cols, column_bytes)
    mine, least, warps = min(n_cols, cols), 12 if whole else 8, 16
    while warps > 1 and mine < least * 32 * warps:
        warps //= 2
    # Two programs of 256 threads fit either way; unbounded, ptxas may spill to make it three.
    registers = 128 if whole and warps == 8 and n_cols <= 4096 else None
    return cols, warps, registers


@jit
def _gradient(
    row,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    partials_ptr,
    values_ptr,
    table_ptr,
    columns,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32, like columns: the gradient of one row."""
    if offsets_ptr is not None:
        g = latent_sum(
            row, offsets_ptr, rows_ptr, coef_ptr, operand_ptr, partials_ptr, columns, D, CHUNK
        )
    else:
        g = tl.zeros(columns.shape, tl.float32)
    if values_ptr is not None:
        place = row
        if table_ptr is not None:
            place = tl.load(table_ptr + row)
        value_ptr = values_ptr + place.to(tl.int64) * D
        g += tl.load(value_ptr + columns, mask=(columns < D) & (place >= 0), other=0.0).to(
            tl.float32
        )
    return g


@jit
def _mix(x):
    """`optimizer/rounding.py`'s."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def _store(ptr, values, bits, mask):
    """Round fp32 values to the pointer's dtype: to bf16 by 16 random bits, else to nearest."""
    if ptr.dtype.element_ty == tl.bfloat16:
        raised = (values.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        values = tl.where(values == values, raised.to(tl.float32, bitcast=True), values)
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@jit(do_not_specialize=["step"])
def _row_adam_kernel(
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    partials_ptr,
    values_ptr,
    table_ptr,
    grad_scale_ptr,
    step,
    step_size,
    decay1,
    gain1,
    decay2,
    gain2,
    correction2,
    eps,
    D: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PROJECT: tl.constexpr,
    RENORMALISE: tl.constexpr,
    LAZY: tl.constexpr,
):
    row = tl.program_id(0)
    if LAZY:
        touched = values_ptr is not None and table_ptr is None
        if offsets_ptr is not None:
            touched |= tl.load(offsets_ptr + row) < tl.load(offsets_ptr + row + 1)
        if table_ptr is not None:
            touched |= tl.load(table_ptr + row) >= 0
        if not touched:
            return
    columns = columns_of(tl.program_id(1), COLS)
    inside = columns < D
    place = row.to(tl.int64) * D + columns
    # Asked for before the gradient, whose chain of loads (offsets, rows, operand) hides them.
    w = tl.load(weight_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
    m = tl.load(exp_avg_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
    v = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
    g = _gradient(
        row,
        offsets_ptr,
        rows_ptr,
        coef_ptr,
        operand_ptr,
        partials_ptr,
        values_ptr,
        table_ptr,
        columns,
        D,
        CHUNK,
    )
    w, m, v = w.to(tl.float32), m.to(tl.float32), v.to(tl.float32)
    if grad_scale_ptr is not None:
        g *= tl.load(grad_scale_ptr).to(tl.float32)
    if PROJECT:
        square = tl.sum(w * w, 0)
        g -= tl.sum(g * w, 0) / tl.where(square == 0.0, 1.0, square) * w
    m = decay1 * m + gain1 * g
    v = decay2 * v + gain2 * g * g
    w -= step_size * m / (tl.sqrt(v) * correction2 + eps)
    if RENORMALISE:
        w = tl.where(inside, w, 0.0)
        norm = tl.sqrt(tl.sum(w * w, 0))
        w /= tl.where(norm == 0.0, 1.0, norm)
    stored = w.to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + place, stored, mask=inside, eviction_policy="evict_first")
    if copy_ptr is not None:
        tl.store(copy_ptr + place, w.to(copy_ptr.dtype.element_ty), mask=inside)
    bits = columns
    if (
        exp_avg_ptr.dtype.element_ty == tl.bfloat16
        or exp_avg_sq_ptr.dtype.element_ty == tl.bfloat16
    ):
        key = _mix(_mix(step.to(tl.uint32)) + row.to(tl.uint32))
        bits = _mix(key + columns.to(tl.uint32))
    _store(exp_avg_ptr + place, m, bits & 0xFFFF, inside)
    _store(exp_avg_sq_ptr + place, v, bits >> 16, inside)


@jit
def _row_squares_kernel(
    squares_ptr,
    offsets_ptr,
    rows_ptr,
    coef_ptr,
    operand_ptr,
    partials_ptr,
    values_ptr,
    table_ptr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    g = _gradient(
        row,
        offsets_ptr,
        rows_ptr,
        coef_ptr,
        operand_ptr,
        partials_ptr,
        values_ptr,
        table_ptr,
        columns_of(block, COLS),
        D,
        CHUNK,
    )
    place = block.to(tl.int64) * tl.num_programs(0) + row
    tl.store(squares_ptr + place, tl.sum(g * g, 0))


def specs() -> Iterator[Spec]:
    floats = ("step_size", "decay1", "gain1", "decay2", "gain2", "correction2", "eps")
    pairs = {**PAIR_POINTERS, "partials_ptr": "*fp32"}
    subset = {"values_ptr": "*fp32", "table_ptr": "*i32"}
    narrow = {"exp_avg_ptr": "*bf16", "exp_avg_sq_ptr": "*bf16"}
    unit = {"PROJECT": True, "RENORMALISE": True}
    usual: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "plain": (pairs, {}),
        "subset": ({**pairs, **subset}, {}),
        "decoder": (pairs, unit),
    }
    unusual: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "unsplit": (PAIR_POINTERS, {}),
        "bf16 moments": ({**pairs, **narrow}, {}),
        "everything": ({**pairs, **subset, **narrow}, unit),
        "lazy": ({**pairs, **subset}, {"LAZY": True}),
        "lazy dense": ({**pairs, "values_ptr": "*fp32"}, {"LAZY": True}),
        "no pairs": (subset, {}),
    }
    for dtype, n_bytes in (("bf16", 2), ("fp32", 4), ("fp16", 2)):
        operand_bytes = SPEC_ROWS * n_bytes
        for n_cols in (768, 2304, 4096, 8192, 100):
            sizes = {"D": n_cols, "CHUNK": chunk_of(n_cols)}
            default = dtype != "fp16" and n_cols in (768, 2304, 4096)
            for name, (pointers, flags) in {**usual, **unusual}.items():
                column_bytes = operand_bytes if "rows_ptr" in pointers else 0
                whole = flags.get("PROJECT", False)
                cols, warps, registers = _shape(n_cols, column_bytes, whole)
                present = {
                    **dict.fromkeys(("weight_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32"),
                    **pointers,
                    "copy_ptr": "*bf16",
                    "grad_scale_ptr": "*fp32",
                    "step": "i32",
                    **dict.fromkeys(floats, "fp32"),
                }
                if "rows_ptr" in pointers:
                    present["operand_ptr"] = f"*{dtype}"
                yield Spec(
                    f"row_adam {name} {dtype} D={n_cols}",
                    _row_adam_kernel,
                    present,
                    {
                        **dict.fromkeys({*pairs, *subset, "operand_ptr"} - present.keys()),
                        **sizes,
                        "COLS": cols,
                        **{"PROJECT": False, "RENORMALISE": False, "LAZY": False, **flags},
                    },
                    num_warps=warps,
                    max_registers=registers,
                    default=default and (name in usual or (dtype, n_cols) == ("bf16", 2304)),
                )
            cols = slice_columns(n_cols, operand_bytes)
            yield Spec(
                f"row_squares {dtype} D={n_cols}",
                _row_squares_kernel,
                {**pairs, **subset, "operand_ptr": f"*{dtype}", "squares_ptr": "*fp32"},
                {**sizes, "COLS": cols},
                num_warps=max(1, cols // 256),
                default=default,
            )
