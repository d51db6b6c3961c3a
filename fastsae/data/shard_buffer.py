"""The rows of a shard while they come in."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.data.model_rows import KeptRows
from fastsae.data.tokens import BEGINNING


class ShardBuffer:
    """Room for the rows of a shard at every hook."""

    def __init__(self, widths: dict[str, int], dtype: torch.dtype, room: int) -> None:
        self.rows = {name: torch.empty(room, width, dtype=dtype) for name, width in widths.items()}
        self.where = torch.empty(2, room, dtype=torch.int32)


class ShardRows:
    """The rows of one shard, as they come in."""

    def __init__(self, buffer: ShardBuffer, number: int) -> None:
        self.buffer, self.number = buffer, number
        self.n = self.contexts = 0
        self.tokens: list[Tensor] = []
        self.left_out: dict[str, int] = {}
        self.end = BEGINNING

    def add(self, part: KeptRows) -> None:
        end = self.n + len(part.context)
        for room, rows in zip(self.buffer.rows.values(), part.rows, strict=True):
            room[self.n : end].copy_(rows)
        self.buffer.where[0, self.n : end].copy_(part.context + self.contexts)
        self.buffer.where[1, self.n : end].copy_(part.position)
        self.tokens.append(part.tokens.to(torch.int32))
        for reason, count in part.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + count
        self.n, self.contexts, self.end = end, self.contexts + len(part.tokens), part.end

    def tensors(self) -> dict[str, Tensor]:
        context, position = self.buffer.where[:, : self.n]
        return {
            **{f"rows.{name}": rows[: self.n] for name, rows in self.buffer.rows.items()},
            "context": context.clone(),
            "position": position.clone(),
            "tokens": torch.cat(self.tokens),
        }
