"""Keys, and which columns make a group: the words in which the kernels of an encode speak.

Keys are int32 in the order of the scores they are made of, NaN above all, so that every comparison
is exact and total.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastsae_kernels._triton import jit

LOWEST = tl.constexpr(-(2**31))
"""Below every key: a column that does not exist."""
HIGHEST = tl.constexpr(2**31 - 1)
NO_ENTRY = tl.constexpr(-(2**63))
"""Below every entry."""
GROUP_SIZES = (64, 32, 16)


class Layout(NamedTuple):
    """Which columns make a group: `columns` of a tile, every (columns / size)th of them."""

    columns: int
    size: int


def group_size(d_sae: int, k: int) -> int:
    """Large groups save memory; four for each latent that is kept are seldom open."""
    return next((size for size in GROUP_SIZES if d_sae // size >= 4 * k), GROUP_SIZES[-1])


@jit
def keys_from(values, SIGNED: tl.constexpr):
    """int32 keys in the order of fp32 values, of their ReLU unless SIGNED; NaN above all."""
    if SIGNED:
        bits = (values + 0.0).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(values != values, HIGHEST, ordered)
    positive = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def values_from(keys):
    """The fp32 values of keys."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def entry_of(keys, columns):
    """int64 in the order of an entry's rank: by key, the lower column first among equals."""
    return (keys.to(tl.int64) << 32) | (columns ^ HIGHEST).to(tl.int64)


@jit
def bound_of(rest):
    return rest & -0x10000


@jit
def first_member(rest):
    return (rest >> 8) & 0xFF


@jit
def second_member(rest):
    return rest & 0xFF


@jit
def column(groups, members, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    N: tl.constexpr = COLUMNS // SIZE
    return groups // N * COLUMNS + members * N + groups % N


def member_columns(groups: Tensor, layout: Layout) -> Tensor:
    """[n, SIZE] int64: the columns that are members of `groups` [n]."""
    members = torch.arange(layout.size, device=groups.device)
    return columns_of(groups.long()[:, None], members, layout)


def columns_of(groups: Tensor, members: Tensor, layout: Layout) -> Tensor:
    """The column of each group's member."""
    per_tile = layout.columns // layout.size
    return groups // per_tile * layout.columns + members * per_tile + groups % per_tile


def keys_of(values: Tensor) -> Tensor:
    """The int32 keys of fp32 values."""
    bits = values.view(torch.int32)
    return torch.where(values.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))


def values_of(keys: Tensor) -> Tensor:
    """The fp32 values of int32 keys."""
    return (keys ^ ((keys >> 31) & (2**31 - 1))).view(torch.float32)
