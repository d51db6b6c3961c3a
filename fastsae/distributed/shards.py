"""The dictionary split by latent: selection, sums and gradients across shards."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.distributed.mesh import Extent, Mesh

DIGIT_BITS = 8
"""Of a key that one round of a selection over all processes decides."""
PART_BITS = 52
"""Of a place (row, latent) within a part of the batch."""


def range_of(n: int, parts: int, part: int) -> range:
    """The part-th of n things in `parts` runs, all of one length but the last, as torch.chunk."""
    length = -(-n // parts)
    return range(min(n, part * length), min(n, (part + 1) * length))


class LatentShards:
    """`fastsae.saes.sharding.Sharding` over a mesh, or a shape without numbers over an `Extent`.

    Raises:
        ValueError: there are too few latents for every shard to have one.
    """

    def __init__(self, mesh: Mesh | Extent, d_sae: int) -> None:
        self.mesh: Any = mesh
        self.d_sae = d_sae
        self.latents = range_of(d_sae, mesh.tp, mesh.shard)
        self.widest = len(range_of(d_sae, mesh.tp, 0))
        if not range_of(d_sae, mesh.tp, mesh.tp - 1):
            raise ValueError(
                f"tp must leave latents for every shard of {self.widest}, got tp {mesh.tp} for "
                f"d_sae {d_sae}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentShards":
        return self

    def total(self, part: Tensor) -> Tensor:
        if self.mesh.tp == 1:
            return part
        summed = _Total.apply(part, self.mesh)
        assert isinstance(summed, Tensor)
        return summed

    def shared(self, parameter: Tensor) -> Tensor:
        if self.mesh.tp == 1:
            return parameter
        copied = _Shared.apply(parameter, self.mesh)
        assert isinstance(copied, Tensor)
        return copied

    def counts(self, n: int) -> list[int]:
        return self.mesh.gather(torch.tensor(n, device=self.mesh.device), "tp").tolist()

    def batch_rows(self, n: int) -> int:
        return n * self.mesh.dp

    def mean_of_parts(self, t: Tensor) -> Tensor:
        return self.mesh.mean(t, "dp")

    def least(self, t: Tensor) -> Tensor:
        return self.mesh.least(t, "world")

    def keep_topk(self, values: Tensor, k: int, width: int) -> Tensor:
        """One threshold a row from everyone's values; ids need not travel.

        The key that decides is (value, then lowest latent). Shards hold ascending ranges of latents
        and a shard's values come lowest latent first among equals, so that order is (value, shard,
        place), which everyone knows without being told the latents.
        """
        if self.mesh.tp == 1:
            return torch.ones_like(values, dtype=torch.bool)
        # NaN is the largest value, and must compare.
        keys = torch.where(values.isnan(), torch.inf, values)
        padding = (0, width - values.shape[1])
        mine = torch.nn.functional.pad(keys, padding, value=-torch.inf)
        everyone = self.mesh.gather(mine, "tp")  # [tp, B, width]
        least = everyone.movedim(0, 1).flatten(1).topk(k, dim=1, sorted=True).values[:, -1:]
        ties = (everyone == least).sum(2)  # [tp, B]
        above = (everyone > least).sum((0, 2))
        left = k - above - ties[: self.mesh.shard].sum(0)
        tied = keys == least
        return (keys > least) | (tied & (tied.cumsum(1) <= left[:, None]))

    def keep_batch_topk(self, values: Tensor, rows: Tensor, latents: Tensor, n: int) -> Tensor:
        """The n-th largest value by radix selection: 256 counts a round travel, no values."""
        bits = torch.int64 if values.dtype == torch.float64 else torch.int32
        # Bits of floats >= 0 are ordered as they are, those of NaN above all.
        keys = (values.view(bits) & torch.iinfo(bits).max).long()
        least, left = self._nth_largest(keys, keys > 0, n, torch.finfo(values.dtype).bits)
        above, tied = keys > least, (keys == least) & (keys > 0)
        place = (self.mesh.part << PART_BITS) + rows * self.d_sae + latents + self.latents.start
        from_behind = 2**62 - place
        last, _ = self._nth_largest(from_behind, tied, left, 63)
        return above | (tied & (from_behind >= last))

    def _nth_largest(
        self, keys: Tensor, among: Tensor, n: int | Tensor, n_bits: int
    ) -> tuple[Tensor, Tensor]:
        """The n-th largest of everyone's keys, 0 with fewer, and the n left below greater keys."""
        prefix = torch.zeros((), dtype=torch.int64, device=keys.device)
        left = torch.as_tensor(n, device=keys.device)
        n_digits = -(-n_bits // DIGIT_BITS)
        digits = 1 << DIGIT_BITS
        for shift in range((n_digits - 1) * DIGIT_BITS, -1, -DIGIT_BITS):
            digit = (keys >> shift) & (digits - 1)
            alive = among & (keys >> shift >> DIGIT_BITS == prefix >> shift >> DIGIT_BITS)
            counts = torch.zeros(digits, dtype=torch.int64, device=keys.device)
            counts.index_add_(0, digit, alive.long())
            counts = self.mesh.sum(counts, "world")
            at_least = counts.flip(0).cumsum(0).flip(0)
            # The greatest digit that as many keys reach as are left; digit 0 where too few are.
            found = ((at_least >= left).sum() - 1).clamp_min(0)
            prefix = prefix | (found << shift)
            left = left - (at_least[found] - counts[found])
        return prefix, left


class _Total(torch.autograd.Function):
    """Sum over shards. Each goes on with the same sum, so the gradient of a part is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Mesh) -> Tensor:
        return mesh.sum(part, "tp")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Shared(torch.autograd.Function):
    """The parameter; each shard's gradient is that of its latents, so they are summed."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.mesh.sum(g, "tp"), None
