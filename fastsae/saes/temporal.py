"""Temporal SAE: what the context predicts, and what is new. Lubana et al. 2025, 2511.01836."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae.checks import check_choice
from fastsae.saes.base import SAE, SAELoss
from fastsae.saes.config import SAEConfig
from fastsae_kernels import RaggedCode, SparseCode, threshold_encode, topk_encode

Novelty = Literal["topk", "relu"]
TemporalNormalization = Literal[
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "constant_scalar_rescale",
]
EPS = 1e-6  # added to the norm of a prediction, as in SAELens


@dataclass(frozen=True, kw_only=True)
class TemporalConfig(SAEConfig):
    """With r = x - b_dec of one position, s = 1 / (4 D), and attention A over the latents:

        z = relu(s r W_enc);  p = relu(A(from the z before, to z));  q = p W_dec
        z_pred += p c and r -= c q with c = <q, r> / (|q| + 1e-6)^2     once a layer of attention
        acts = the kval_topk largest of relu(s r W_enc)
        x_hat = (acts + z_pred) W_dec + b_dec

    `acts`, what is new at a position, are the SAE's latents: `encode` and `decode` are about them
    alone, `forward` adds what the context predicts. For use only: it cannot be trained here.
    """

    architecture: ClassVar[str] = "temporal"
    normalizations: ClassVar[tuple[str, ...]] = get_args(TemporalNormalization)

    normalize_activations: TemporalNormalization = "none"  # pyright: ignore[reportIncompatibleVariableOverride]
    n_heads: int = 8
    n_attn_layers: int = 1
    bottleneck_factor: int = 64
    """Queries and keys have F / bottleneck_factor entries, all heads together."""
    sae_diff_type: Novelty = "topk"
    """Whether the new part keeps `kval_topk` latents a position, or all that are positive."""
    kval_topk: int | None = None
    """None: all that are positive."""
    tied_weights: bool = True
    """Whether W_enc is W_dec transposed."""
    activation_normalization_factor: float = 1.0
    """What rows are multiplied by under `constant_scalar_rescale`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "sae_diff_type", get_args(Novelty))
        if self.d_sae % (self.bottleneck_factor * self.n_heads):
            raise ValueError(
                f"d_sae must be a multiple of bottleneck_factor * n_heads = "
                f"{self.bottleneck_factor * self.n_heads}, got {self.d_sae}"
            )
        if self.kval_topk is not None and not 1 <= self.kval_topk <= self.d_sae:
            raise ValueError(
                f"kval_topk must be in [1, d_sae] with d_sae = {self.d_sae}, got {self.kval_topk}"
            )

    def check_trainable(self) -> None:
        raise ValueError(
            "architecture must be one that can be trained, got 'temporal', which can be loaded "
            "and used"
        )


class TemporalSAE(SAE):
    """Takes sequences [..., L, D]: what a position's code is depends on those before it."""

    config_class = TemporalConfig
    cfg: TemporalConfig
    splits_by_latent = False

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        cfg = self.cfg
        rows = self._initial_rows(cfg.d_in, device).to(dtype)
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, dtype=dtype, device=device))
        if not cfg.tied_weights:
            self.W_enc = nn.Parameter(rows.clone().t())
        self.attn_layers = nn.ModuleList(
            _Attention(cfg.d_sae, cfg.n_heads, cfg.bottleneck_factor).to(device, dtype)
            for _ in range(cfg.n_attn_layers)
        )

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and self.cfg.tied_weights:
            return self.W_dec.t()
        return super().__getattr__(name)

    def encode_sparse(self, x: Float[Tensor, "... L D"]) -> SparseCode | RaggedCode:
        """What is new at each position."""
        residual, _ = self._split(self.prepare(x))
        none = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        scaled, k = residual * self._gain, self._k
        if k is None:
            rows = scaled.reshape(-1, self.cfg.d_in)
            return threshold_encode(rows, self.W_enc, none, impl=self.impl)
        return topk_encode(scaled, self.W_enc, none, k, impl=self.impl)._replace(groups=None)

    def predicted_acts(self, x: Float[Tensor, "... L D"]) -> Float[Tensor, "... L F"]:
        """Dense z_pred: the latents that the context predicts, each time its share of x."""
        return self._split(self.prepare(x))[1]

    def forward(self, x: Float[Tensor, "... L D"]) -> Float[Tensor, "... L D"]:
        """decode(encode(x)) and what the context predicts."""
        x_hat = self.decode(self.encode_sparse(x)).reshape(x.shape)
        return (x_hat + self._skipped(x.to(self.dtype))).to(x.dtype)

    def _skipped(self, x: Tensor) -> Tensor:
        predicted = self._split(self.prepare(x))[1] @ self.W_dec
        # In the units of x: rows were normalised on the way in.
        return (predicted if self._undo is None else predicted * self._undo[0]).reshape(x.shape)

    def pre_acts(self, x: Float[Tensor, "... L D"]) -> Float[Tensor, "... L F"]:
        """Dense scores of what is new; differentiable."""
        return self._split(self.prepare(x))[0] * self._gain @ self.W_enc

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        acts = pre_acts.relu()
        if self._k is None:
            return acts
        largest = acts.topk(self._k, dim=-1).indices
        return torch.zeros_like(acts).scatter(-1, largest, acts.gather(-1, largest))

    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        """Always refused: see `TemporalConfig.check_trainable`."""
        self.cfg.check_trainable()
        raise AssertionError

    @property
    def _gain(self) -> float:
        return 1 / (4 * self.cfg.d_in)

    @property
    def _k(self) -> int | None:
        return self.cfg.kval_topk if self.cfg.sae_diff_type == "topk" else None

    def _split(self, rows: Tensor) -> tuple[Float[Tensor, "... L D"], Float[Tensor, "... L F"]]:
        """What the context does not predict of normalised rows, and the latents of what it does."""
        if rows.ndim < 2:
            raise ValueError(f"x must be sequences [..., L, D], got {list(rows.shape)}")
        residual = rows if self.b_pre is None else rows - self.b_pre
        predicted = residual.new_zeros(*residual.shape[:-1], self.cfg.d_sae)
        for attention in self.attn_layers:
            z = (residual * self._gain @ self.W_enc).relu()
            before = F.pad(z[..., :-1, :], (0, 0, 1, 0))
            p = attention(before, z).relu()
            q = p @ self.W_dec
            norm = q.norm(dim=-1, keepdim=True) + EPS
            share = (q * residual).sum(-1, keepdim=True) / norm.square()
            predicted = predicted + p * share
            residual = residual - share * q
        return residual, predicted

    def _normalise(self, x: Tensor) -> Tensor:
        z = super()._normalise(x)
        if self.cfg.normalize_activations != "constant_scalar_rescale":
            return z
        factor = self.cfg.activation_normalization_factor
        self._undo = z.new_full((*z.shape[:-1], 1), 1 / factor), None
        return z * factor

    def _decode_dense(self, acts: Tensor) -> Tensor:
        x_hat = acts.to(self.dtype) @ self.W_dec
        return x_hat + self.b_dec if self._adds_b_dec else x_hat

    @property
    def _adds_b_dec(self) -> bool:
        return self.cfg.apply_b_dec_to_input or not self.cfg.tied_weights

    def decode(self, acts: Float[Tensor, "... F"] | SparseCode | RaggedCode) -> Tensor:
        """acts W_dec + b_dec: the part of x_hat that is new at a position."""
        if isinstance(acts, Tensor) or self._adds_b_dec:
            return super().decode(acts)
        return super().decode(acts.to_dense(self.cfg.d_sae))

    @property
    def can_fold_W_dec_norm(self) -> bool:
        return False

    def fold_W_dec_norm(self) -> None:
        """Always refused.

        Raises:
            ValueError: attention reads the latents in the units they have.
        """
        raise ValueError("fold_W_dec_norm must not be called on a temporal SAE" + _WHY)

    def fold_activation_scale(self, scale: float) -> None:
        """Always refused, as `fold_W_dec_norm` is."""
        raise ValueError("fold_activation_scale must not be called on a temporal SAE" + _WHY)

    def fold_activation_whitening(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> None:
        """Always refused, as `fold_W_dec_norm` is."""
        raise ValueError("fold_activation_whitening must not be called on a temporal SAE" + _WHY)


_WHY = ", whose attention reads the latents in the units they have"


class _Attention(nn.Module):
    """Causal attention from the latents of earlier positions, [..., L, F] -> [..., L, F]."""

    def __init__(self, d_sae: int, n_heads: int, bottleneck_factor: int) -> None:
        super().__init__()
        narrow = d_sae // bottleneck_factor
        self.n_heads = n_heads
        self.k_ctx, self.q_target = nn.Linear(d_sae, narrow), nn.Linear(d_sae, narrow)
        self.v_ctx, self.c_proj = nn.Linear(d_sae, d_sae), nn.Linear(d_sae, d_sae)
        for layer, width in (
            (self.k_ctx, narrow // n_heads),
            (self.q_target, narrow // n_heads),
            (self.v_ctx, d_sae // n_heads),
            (self.c_proj, d_sae),
        ):
            layer.weight.data = F.normalize(layer.weight.data, dim=1) / math.sqrt(width)

    def forward(self, before: Tensor, at: Tensor) -> Tensor:
        heads = lambda t: t.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(
            heads(self.q_target(at)),
            heads(self.k_ctx(before)),
            heads(self.v_ctx(before)),
            is_causal=True,
        )
        return self.c_proj(mixed.transpose(-2, -3).flatten(-2))
