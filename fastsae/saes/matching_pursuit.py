"""Matching pursuit SAE: one latent at a time. Costa et al. 2025, arXiv 2506.03093."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsae.checks import check_counts
from fastsae.saes.base import SAE, SAELoss
from fastsae.saes.config import SAEConfig
from fastsae_kernels import RaggedCode, sparse_decode, topk_encode


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(SAEConfig):
    """r = x - b_dec; then j = argmax r . W_dec[j], v = relu(r . W_dec[j]), r -= v W_dec[j], again.

    acts[j] is the sum of the v of its rounds. A row ends when a latent comes a second time or when
    |r| is below `residual_threshold`.
    """

    architecture: ClassVar[str] = "matching_pursuit"

    decoder_init_norm: float = 1.0
    residual_threshold: float = 1e-2
    """Norm of what is left at which a row is done; 0: it never is by that."""
    max_iterations: int | None = None
    """Most rounds; None: D."""
    stop_on_duplicate_support: bool = True
    """Whether a row is done when a latent comes a second time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_threshold < 0:
            raise ValueError(
                f"residual_threshold must be at least 0, got {self.residual_threshold}"
            )
        check_counts(self, "max_iterations", optional=True)


class MatchingPursuitSAE(SAE):
    """Encoder and decoder are one: W_enc is W_dec transposed. Trains with `kind="adam"`."""

    config_class = MatchingPursuitConfig
    cfg: MatchingPursuitConfig
    splits_by_latent = False

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        self.W_dec = nn.Parameter(self._initial_rows(self.cfg.d_in, device).to(dtype))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, dtype=dtype, device=device))

    @property
    def W_enc(self) -> Tensor:
        return self.W_dec.t()

    def encode_sparse(self, x: Float[Tensor, "... D"]) -> RaggedCode:
        """The chosen latents; leading axes of x are flattened into B rows."""
        return self._pursue(self._centred(self.prepare(x)))[0]

    def pre_acts(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        raise NotImplementedError("a matching pursuit SAE has acts of several rounds, not pre-acts")

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        """mse, which is what the pursuit leaves over."""
        rows = self._training_rows(x)
        code, residual = self._pursue(self._centred(rows.x.to(self.dtype)))
        per_row = residual.square().sum(-1)
        mse = (per_row if rows.weight is None else per_row * rows.weight).mean()
        err = -residual.detach()
        err = err if rows.weight is None else err * rows.weight.sqrt().unsqueeze(-1)
        counts = code.indices.bincount(minlength=self.cfg.d_sae)
        return SAELoss(mse, {"mse": mse.detach()}, x, err, counts, code)

    def _centred(self, rows: Tensor) -> Tensor:
        rows = rows.reshape(-1, self.cfg.d_in)
        return rows if self.b_pre is None else rows - self.b_pre

    def _pursue(self, residual: Float[Tensor, "B D"]) -> tuple[RaggedCode, Float[Tensor, "B D"]]:
        """The code of centred rows, and what it leaves over: rows - code W_dec."""
        cfg, n_rows = self.cfg, len(residual)
        none = torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device)
        done = torch.zeros(n_rows, dtype=torch.bool, device=residual.device)
        chosen, values = [], []
        for _ in range(cfg.max_iterations or cfg.d_in):
            best = topk_encode(residual.detach(), self.W_dec.detach().t(), none, 1, impl=self.impl)
            latent = best.indices.squeeze(1).long()
            row = self.W_dec[latent]
            value = (residual * row).sum(-1).relu() * ~done
            residual = residual - value[:, None] * row
            if cfg.stop_on_duplicate_support:
                for earlier, given in zip(chosen, values, strict=True):
                    done = done | ((earlier == latent) & (given != 0))
                done = done | (value == 0)
            chosen.append(latent)
            values.append(value)
            if cfg.residual_threshold > 0:
                done = done | (residual.detach().norm(dim=-1) < cfg.residual_threshold)
            if bool(done.all()):
                break
        return _ragged(torch.stack(chosen, 1), torch.stack(values, 1), cfg.d_sae), residual

    def _decode_dense(self, acts: Tensor) -> Tensor:
        x_hat = acts.to(self.dtype) @ self.W_dec
        return x_hat if self.b_pre is None else x_hat + self.b_pre

    def decode(self, acts: Float[Tensor, "... F"] | RaggedCode) -> Tensor:
        """acts W_dec, and b_dec where it was taken off the input."""
        if isinstance(acts, Tensor) or self.b_pre is not None:
            return super().decode(acts)
        return self._restore(sparse_decode(acts, self.W_dec, impl=self.impl))

    @property
    def can_fold_W_dec_norm(self) -> bool:
        return False

    def fold_W_dec_norm(self) -> None:
        """Always refused.

        Raises:
            ValueError: the decoder is the encoder, so that other norms choose other latents.
        """
        raise ValueError(
            "fold_W_dec_norm must not be called on a matching pursuit SAE, whose decoder is its "
            "encoder: other norms choose other latents"
        )

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        """Make an SAE trained on `scale * x` one of x: the dictionary stays, b_dec shrinks."""
        self.b_dec.div_(scale)
        self.cfg = replace(
            self.cfg,
            residual_threshold=self.cfg.residual_threshold / scale,
            normalize_activations="none"
            if self.cfg.normalize_activations == "expected_average_only_in"
            else self.cfg.normalize_activations,
        )

    def fold_activation_whitening(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> None:
        """Always refused.

        Raises:
            ValueError: encoder and decoder would no longer be one.
        """
        raise ValueError(
            "normalize_activations must not be 'covariance_whitening' for a matching pursuit SAE, "
            "whose encoder is its decoder"
        )


def _ragged(chosen: Tensor, values: Tensor, d_sae: int) -> RaggedCode:
    """Rounds [B, T] as a code; what a latent got in several rounds is summed."""
    n_rows = len(chosen)
    rows, slots = (values.detach() != 0).nonzero(as_tuple=True)
    places, entry = torch.unique(rows * d_sae + chosen[rows, slots], return_inverse=True)
    acts = values.new_zeros(len(places)).index_add(0, entry, values[rows, slots])
    counts = (places // d_sae).bincount(minlength=n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
    return RaggedCode(offsets.int(), (places % d_sae).int(), acts)
