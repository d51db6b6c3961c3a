"""TopK SAE: the k largest latents of each row. Gao et al. 2024, arXiv 2406.04093."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.saes.base import SAE, SAELoss, TrainingRows
from fastsae.saes.config import RUN_TIME_NORMALIZATIONS, SAEConfig
from fastsae_kernels import (
    RaggedCode,
    SparseCode,
    aux_topk,
    group_by_latent,
    topk_encode,
)

T = TypeVar("T", bound=SparseCode | RaggedCode)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """h = (x - b_dec) W_enc + b_enc; acts = the k largest of relu(h * n), n = |W_dec rows|."""

    architecture: ClassVar[str] = "topk"
    file_defaults = {"rescale_acts_by_decoder_norm": False}

    k: int = 64
    """Active latents a row."""
    rescale_acts_by_decoder_norm: bool = True
    """Rank latents by h * n, so that the norms of W_dec's rows do not matter; n = 1 otherwise."""
    aux_loss_coefficient: float = 1.0
    """Weight of AuxK, the loss that revives dead latents; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must be in [1, d_sae] with d_sae = {self.d_sae}, got {self.k}")

    def check_trainable(self) -> None:
        refuse_auxk_under_run_time_normalisation(self)


class TopKSAE(SAE):
    config_class = TopKConfig
    ranks_absolute: ClassVar[bool] = False
    """Whether latents are ranked by the size of h * n, whatever its sign."""
    cfg: TopKConfig

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> SparseCode:
        # Without groups: they are of these acts, and a caller may well change the acts.
        return self._encode(self.prepare(x), self._scale())._replace(groups=None)

    def _encode(self, x: Tensor, scale: Tensor | None) -> SparseCode:
        return topk_encode(
            x,
            self.W_enc,
            self.b_enc,
            self.cfg.k,
            b_pre=self.b_pre,
            scale=scale,
            W_compute=self.compute_copies.get("W_enc"),
            shards=self.shards,
            impl=self.impl,
        )

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        scale = self._scale()
        ranked = pre_acts if scale is None else pre_acts * scale
        return self._kept(ranked if self.ranks_absolute else ranked.relu())

    def _kept(self, ranked: Tensor) -> Tensor:
        """Dense, the entries that are not among the largest set to 0."""
        largest = ranked.abs().topk(self.cfg.k, dim=-1).indices
        return torch.zeros_like(ranked).scatter(-1, largest, ranked.gather(-1, largest))

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        rows = self._training_rows(x)
        scale = self._scale()
        # Without gradient: in acts / n it cancels against the one of the encoder's h * n.
        scale = None if scale is None else scale.detach()
        code = self._encode(rows.x, scale)
        mse, _, err = self._reconstruction(rows, divided(code, scale))
        total, terms = mse, {"mse": mse.detach()}
        if self.cfg.aux_loss_coefficient:
            auxk = torch.zeros_like(mse) if dead is None else self._auxk(rows, err, dead, scale)
            total, terms["auxk"] = total + auxk, auxk.detach()
        groups = code.groups or group_by_latent(code, len(self.latents), impl=self.impl)
        return SAELoss(total, terms, x, err, groups.counts(), code)

    def _auxk(self, rows: TrainingRows, err: Tensor, dead: Tensor, scale: Tensor | None) -> Tensor:
        """AuxK, weighted."""
        if rows.weight is not None and bool(dead.any()):
            refuse_auxk_under_run_time_normalisation(self.cfg)
        return self.cfg.aux_loss_coefficient * aux_topk(
            rows.x,
            err,
            dead,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            b_pre=self.b_pre,
            scale=scale,
            absolute=self.ranks_absolute,
            shards=self.shards,
            impl=self.impl,
        )

    def _scale(self) -> Tensor | None:
        return self.decoder_norms() if self.cfg.rescale_acts_by_decoder_norm else None

    def decoder_code(self, code: SparseCode | RaggedCode) -> SparseCode | RaggedCode:
        return divided(code, self._scale())

    def _decode_dense(self, acts: Tensor) -> Tensor:
        scale = self._scale()
        return super()._decode_dense(acts if scale is None else acts / scale)

    @property
    def can_fold_W_dec_norm(self) -> bool:
        return self.cfg.rescale_acts_by_decoder_norm

    def fold_W_dec_norm(self) -> None:
        """Give W_dec unit rows and the encoder their norms.

        Raises:
            ValueError: latents are ranked without decoder norms, so folding would change the k.
        """
        if not self.can_fold_W_dec_norm:
            raise ValueError(
                "rescale_acts_by_decoder_norm must be True to fold decoder norms into a TopK SAE, "
                "got False: folding would change which k latents are the largest"
            )
        super().fold_W_dec_norm()

    def fold_activation_whitening(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> None:
        """As for every SAE; norms are folded first, since whitening changes them."""
        if self.cfg.rescale_acts_by_decoder_norm:
            self.fold_W_dec_norm()
            self.cfg = replace(self.cfg, rescale_acts_by_decoder_norm=False)
        super().fold_activation_whitening(mean, matrix, inverse)


def refuse_auxk_under_run_time_normalisation(cfg: Any) -> None:
    """Raise ValueError: what dead latents should learn there has never been defined."""
    at_run_time = cfg.normalize_activations in RUN_TIME_NORMALIZATIONS
    if at_run_time and cfg.aux_loss_coefficient:
        raise ValueError(
            "aux_loss_coefficient must be 0 to train with normalize_activations "
            f"{cfg.normalize_activations!r}, got {cfg.aux_loss_coefficient}; normalise the rows "
            "before training instead"
        )


def divided(code: T, scale: Tensor | None) -> T:
    """The code of the acts that multiply W_dec's rows, norms taken out again."""
    if scale is None:
        return code
    norms = scale[code.indices.long()]
    # A latent without a decoder row is never active, but it may fill a short row up.
    return code._replace(acts=torch.where(code.acts == 0, 0, code.acts / norms))
