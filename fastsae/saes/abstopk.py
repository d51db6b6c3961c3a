"""AbsTopK SAE: the k largest latents of each row by size, signs kept. Zhu et al. 2025."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsae.saes.topk import TopKConfig, TopKSAE
from fastsae_kernels import SparseCode, topk_encode


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(TopKConfig):
    """h = (x - b_dec) W_enc + b_enc; acts = the k entries of h * n with the largest |h * n|."""

    architecture: ClassVar[str] = "abstopk"


class AbsTopKSAE(TopKSAE):
    config_class = AbsTopKConfig
    cfg: AbsTopKConfig
    ranks_absolute = True

    def _encode(self, x: Tensor, scale: Tensor | None) -> SparseCode:
        """The k best of the k largest of h and the k largest of -h.

        Two products where one would do, but no dense h: the rows are negated, not the dictionary.
        A row with less than k entries other than 0 is filled up with acts of 0, at latents that may
        repeat.
        """
        b_pre, k = self.b_pre, min(self.cfg.k, len(self.latents))
        signed = [
            topk_encode(
                sign * x,
                self.W_enc,
                sign * self.b_enc,
                k,
                b_pre=None if b_pre is None else sign * b_pre,
                scale=scale,
                W_compute=self.compute_copies.get("W_enc"),
                impl=self.impl,
            )
            for sign in (1, -1)
        ]
        sizes = torch.cat([code.acts for code in signed], dim=-1)
        indices = torch.cat([code.indices for code in signed], dim=-1)
        sizes, order = sizes.topk(k, dim=-1)
        if self.shards is not None:
            width = min(self.cfg.k, self.shards.widest)
            sizes = torch.where(self.shards.keep_topk(sizes.detach(), self.cfg.k, width), sizes, 0)
        sign = torch.where(order < k, 1, -1)
        return SparseCode(sizes * sign, indices.gather(-1, order))
