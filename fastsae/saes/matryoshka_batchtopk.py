"""Matryoshka BatchTopK SAE: nested dictionaries in one. Bussmann et al. 2025, arXiv 2503.17547."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.saes.base import SAELoss
from fastsae.saes.batchtopk import BatchTopKConfig, BatchTopKSAE
from fastsae.saes.topk import divided
from fastsae_kernels import RaggedCode, group_by_latent, sparse_decode


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig(BatchTopKConfig):
    """BatchTopK whose first w latents reconstruct x as well, for each w of `matryoshka_widths`.

    loss = sum over widths w of mean_b |acts[:w] W_dec[:w] + b_dec - x|^2, plus AuxK.
    """

    architecture: ClassVar[str] = "matryoshka_batchtopk"

    matryoshka_widths: Sequence[int] = ()
    """Numbers of latents, ascending; d_sae is added where it is not the last. Empty: an
    eighth, a quarter, half and all of d_sae."""
    use_matryoshka_aux_loss: bool = False
    """Whether the dead latents of each level learn from what that level leaves over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = tuple(self.matryoshka_widths) or tuple(
            w for w in (self.d_sae // 8, self.d_sae // 4, self.d_sae // 2) if w
        )
        widths = widths if widths[-1:] == (self.d_sae,) else (*widths, self.d_sae)
        ascending = all(a < b for a, b in zip((0, *widths), widths, strict=False))
        if not ascending:
            raise ValueError(
                "matryoshka_widths must be strictly increasing from at least 1 to at most d_sae = "
                f"{self.d_sae}, got {list(self.matryoshka_widths)}"
            )
        object.__setattr__(self, "matryoshka_widths", widths)


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    config_class = MatryoshkaBatchTopKConfig
    cfg: MatryoshkaBatchTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        rows = self._training_rows(x)
        scale = self._scale()
        scale = None if scale is None else scale.detach()
        code = self._encode(rows.x, scale)
        unscaled = divided(code, scale)
        total = auxk = torch.zeros((), dtype=code.acts.dtype, device=code.acts.device)
        terms: dict[str, Tensor] = {}
        # Each level decodes its own latents and adds them to the level before; autograd then sums
        # the errors of all levels that a latent takes part in before the rows are gathered.
        err = self.b_dec.to(code.acts.dtype) - rows.target
        first = 0
        for width in self.cfg.matryoshka_widths:
            here = [edge - self.latents.start for edge in (first, width)]
            part = sparse_decode(_level(unscaled, *here), self.W_dec, impl=self.impl)
            err = err + self._over_latents(part)
            per_row = err.square().sum(-1)
            mse = (per_row if rows.weight is None else per_row * rows.weight).mean()
            total = total + mse
            terms["mse" if width == self.cfg.d_sae else f"inner_mse_{width}"] = mse.detach()
            if dead is not None and self.cfg.use_matryoshka_aux_loss:
                level = torch.arange(self.latents.start, self.latents.stop, device=dead.device)
                of_level = dead & (level >= first) & (level < width)
                auxk = auxk + self._auxk(rows, err.detach(), of_level, scale)
            first = width
        err = err.detach()
        if self.cfg.aux_loss_coefficient:
            if dead is not None and not self.cfg.use_matryoshka_aux_loss:
                auxk = self._auxk(rows, err, dead, scale)
            total, terms["auxk"] = total + auxk, auxk.detach()
        if rows.weight is not None:
            err = err * rows.weight.sqrt().unsqueeze(-1)
        self._update_threshold(code.acts.detach())
        groups = code.groups or group_by_latent(code, len(self.latents), impl=self.impl)
        return SAELoss(total, terms, x, err, groups.counts(), code)


def _level(code: RaggedCode, first: int, last: int) -> RaggedCode:
    """The entries of latents first to last - 1."""
    inside = (code.indices >= first) & (code.indices < last)
    before = torch.cat([inside.new_zeros(1), inside]).cumsum(0)
    kept = inside.nonzero().squeeze(1)
    offsets = before.index_select(0, code.row_offsets).int()
    return RaggedCode(offsets, code.indices[kept], code.acts[kept])
