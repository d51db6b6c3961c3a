"""Exact top-k whose [B, F] scores never leave the registers of the product that makes them.

Four launches, no atomics, no host synchronisation; docs/kernels.md has the proof.

1. `_group_top2` (groups.py): a matrix product whose epilogue keeps, of each row and group of
   columns, two of the largest keys, where they were, and a bound of all the others.
2. `_select_groups` (selection.py), a warp a row: tau, which k of those keys reach; which of them
   are among the k best; which groups are *open*, that is may hide another one: at most k of them,
   seldom any.
3. `_sort_entries`, a warp a row: the k best of a row without open groups, in order.
4. `_merge_open_groups`: the open groups of the other rows are scored again and merged.

Keys are int32 in the order of the scores they are made of, NaN above all, so that every comparison
is exact and total. Temporary memory: 12 bytes for each row and group (4.7 % of an fp32 [B, F] at
groups of 64, which is where F >= 256 k; 9.4 and 19 % at 32 and 16) and 20 k bytes a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._triton import Spec, device_of, jit, padded
from fastsae_kernels.topk.groups import affine, group_top2
from fastsae_kernels.topk.groups import specs as group_specs
from fastsae_kernels.topk.keys import (
    GROUP_SIZES,
    HIGHEST,
    NO_ENTRY,
    column,
    entry_of,
    group_size,
    values_from,
)
from fastsae_kernels.topk.scores import AOT_TYPES, TRITON_TYPES, by, score
from fastsae_kernels.topk.scores import specs as score_specs
from fastsae_kernels.topk.selection import select_groups
from fastsae_kernels.topk.selection import specs as selection_specs


def fits(d_sae: int, k: int) -> bool:
    """Whether there are four groups for each latent that is kept.

    With fewer many groups are open (one is enough for exactness), and scoring them again costs more
    than was saved: `eager` does it.
    """
    return d_sae // GROUP_SIZES[-1] >= 4 * k


@jit
def _larger(others, entries):
    """[R, N]: how many of `others` [R, M] are larger than each of `entries` [R, N]."""
    return tl.sum((others[:, :, None] > entries[:, None, :]).to(tl.int32), 1)


@jit
def _store_code(acts, indices, at, entry, mask):
    tl.store(acts + at, values_from((entry >> 32).to(tl.int32)), mask=mask)
    tl.store(indices + at, (entry & HIGHEST).to(tl.int32) ^ HIGHEST, mask=mask)


@jit(do_not_specialize=["n_rows", "k"])
def _sort_entries(
    entries,
    in_order,
    n_open,
    acts,
    indices,
    n_rows,
    k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows without open groups are finished here; of the others the entries are put in order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (rows < n_rows)[:, None]
    at = rows.to(tl.int64)[:, None] * k
    slots = tl.arange(0, CHUNK)[None, :]
    finished = (tl.load(n_open + rows, mask=rows < n_rows, other=0) == 0)[:, None]
    # By counting the larger ones: entries are distinct.
    start = 0
    while start < k:
        inside = real & (start + slots < k)
        mine = tl.load(entries + at + start + slots, mask=inside, other=NO_ENTRY)
        rank = tl.zeros((ROWS, CHUNK), tl.int32)
        other = 0
        while other < k:
            mask = real & (other + slots < k)
            rank += _larger(tl.load(entries + at + other + slots, mask=mask, other=NO_ENTRY), mine)
            other += CHUNK
        tl.store(in_order + at + rank, mine, mask=inside & (finished == 0))
        _store_code(acts, indices, at + rank, mine, inside & finished)
        start += CHUNK


@jit(do_not_specialize=["n_rows", "k"])
def _merge_open_groups(
    x,
    W_enc,
    offset,
    scale,
    in_order,
    spare,
    open_groups,
    n_open,
    acts,
    indices,
    n_rows,
    d_in,
    d_sae,
    k,
    stride_x,
    stride_d,
    stride_f,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    opened = tl.load(n_open + rows, mask=rows < n_rows, other=0)
    most = tl.max(opened)
    if most == 0:
        return
    at = rows.to(tl.int64)[:, None] * k
    slots = tl.arange(0, CHUNK)[None, :]
    members = tl.arange(0, SIZE)[None, :]
    source, target = spare, in_order
    for number in range(0, most):
        source, target = target, source
        busy = (number < opened)[:, None]
        group = tl.load(open_groups + rows.to(tl.int64) * k + number, mask=number < opened, other=0)
        columns = column(group[:, None], members, SIZE, COLUMNS)
        inside = busy & (columns < d_sae)
        keys = score(
            x + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * stride_x,
            W_enc,
            offset,
            scale,
            columns,
            inside,
            d_in,
            stride_d,
            stride_f,
            SCALED,
            SIGNED,
            PRODUCT,
            DEPTH,
        )
        found = tl.where(inside, entry_of(keys, columns), NO_ENTRY)

        rank = _larger(found, found)
        start = 0
        while start < k:
            mask = busy & (start + slots < k)
            held = tl.load(source + at + start + slots, mask=mask, other=NO_ENTRY)
            rank += _larger(held, found)
            moved = start + slots + _larger(found, held)
            tl.store(target + at + moved, held, mask=mask & (moved < k))
            start += CHUNK
        tl.store(target + at + rank, found, mask=inside & (rank < k))
        if ROWS > 1:
            # Rows that have no more open groups come along.
            start = 0
            while start < k:
                mask = (rows < n_rows)[:, None] & (busy == 0) & (start + slots < k)
                held = tl.load(source + at + start + slots, mask=mask)
                tl.store(target + at + start + slots, held, mask=mask)
                start += CHUNK
        tl.debug_barrier()

    start = 0
    while start < k:
        mask = (opened > 0)[:, None] & (start + slots < k)
        entry = tl.load(target + at + start + slots, mask=mask, other=0)
        _store_code(acts, indices, at + start + slots, entry, mask)
        start += CHUNK


def select_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor]:
    n_rows, (d_in, d_sae) = len(x), W_enc.shape
    acts = torch.empty(n_rows, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    if n_rows == 0:
        return acts, indices
    x, (offset, scale) = x.contiguous(), affine(b_enc, scale)
    found = group_top2(x, W_enc, offset, group_size(d_sae, k), scale, signed)
    entries = torch.empty(2, n_rows, k, dtype=torch.int64, device=x.device)
    open_groups = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    n_open = torch.empty(n_rows, dtype=torch.int32, device=x.device)
    chunk = _merge_chunk(k)
    select_groups(found, k, signed, entries[0], open_groups, n_open)
    few = min(INTERPRETED_ROWS if interpreted() else 1, padded(n_rows, 1))
    with device_of(x):
        _sort_entries[(triton.cdiv(n_rows, few),)](
            entries[0],
            entries[1],
            n_open,
            acts,
            indices,
            n_rows,
            k,
            ROWS=few,
            CHUNK=chunk,
            num_warps=1,
        )
        _merge_open_groups[(triton.cdiv(n_rows, few),)](
            x,
            W_enc,
            offset,
            offset if scale is None else scale,
            entries[1],
            entries[0],
            open_groups,
            n_open,
            acts,
            indices,
            n_rows,
            d_in,
            d_sae,
            k,
            x.stride(0),
            W_enc.stride(0),
            W_enc.stride(1),
            SCALED=scale is not None,
            SIGNED=signed,
            PRODUCT=TRITON_TYPES[x.dtype],
            SIZE=found.layout.size,
            COLUMNS=found.layout.columns,
            ROWS=few,
            CHUNK=chunk,
            DEPTH=MERGE_BYTES // W_enc.element_size() // found.layout.size,
            num_warps=MERGE_WARPS,
            **({} if torch.version.hip else {"maxnreg": MERGE_REGISTERS}),
        )
    return acts, indices


INTERPRETED_ROWS = 8
"""Rows that a program sorts or merges in the interpreter, which pays for each program; one on a
GPU, where more would spill registers."""
MERGE_BYTES, MERGE_WARPS, MERGE_REGISTERS = 8192, 4, 128
"""Of weights that are read at a time when an open group is scored again."""


def _merge_chunk(k: int) -> int:
    """Entries that are compared at a time; 32 would spill with Triton 3.6."""
    return 16 if k <= 16 else 64


def specs() -> Iterator[Spec]:
    yield from group_specs()
    yield from score_specs()
    for dtype in ("bf16", "fp32"):
        for k in (16, 64):
            for size in GROUP_SIZES:
                yield _merge_spec(dtype, dtype, k, size)
    yield _merge_spec("fp16", "fp16", 64, 64)
    yield _merge_spec("bf16", "bf16", 64, 64, ", unscaled", SCALED=False)
    yield _merge_spec("bf16", "fp32", 64, 64, ", signed, unscaled", SIGNED=True, SCALED=False)
    for k in (16, 64):
        yield _sort_spec(k)
    yield from selection_specs()


def _sort_spec(k: int) -> Spec:
    pointers = {"entries": "*i64", "in_order": "*i64", "n_open": "*i32"}
    pointers |= {"acts": "*fp32", "indices": "*i32"}
    return Spec(
        f"topk.sort_entries[k = {k}]",
        _sort_entries,
        {**pointers, "n_rows": "i32", "k": "i32"},
        {"ROWS": 1, "CHUNK": _merge_chunk(k)},
        num_warps=1,
    )


def _merge_spec(
    dtype: str, weight: str, k: int, size: int, note: str = "", **changed: bool
) -> Spec:
    pointers = {"x": f"*{dtype}", "W_enc": f"*{weight}", "offset": "*fp32", "scale": "*fp32"}
    pointers |= {"in_order": "*i64", "spare": "*i64", "open_groups": "*i32", "n_open": "*i32"}
    pointers |= {"acts": "*fp32", "indices": "*i32"}
    sizes = ("n_rows", "d_in", "d_sae", "k", "stride_x", "stride_f")
    return Spec(
        f"topk.merge_open_groups[{dtype}{by(weight, dtype)}, k = {k}, groups of {size}{note}]",
        _merge_open_groups,
        {**pointers, **dict.fromkeys(sizes, "i32")},
        {
            "stride_d": 1,
            "SCALED": True,
            "SIGNED": False,
            "PRODUCT": AOT_TYPES[dtype],
            "SIZE": size,
            "COLUMNS": 256,
            "ROWS": 1,
            "CHUNK": _merge_chunk(k),
            "DEPTH": MERGE_BYTES // (4 if weight == "fp32" else 2) // size,
            **changed,
        },
        num_warps=MERGE_WARPS,
        max_registers=MERGE_REGISTERS,
        default=size == 64,
    )
