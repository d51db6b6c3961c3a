"""What every sparse autoencoder shares: its shape, its input path, decoding, and files.

A variant is one file beside this one: a config, a class with `encode_sparse` and `loss`, and one
line in `SAES`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastsae.saes.config import SAEConfig
from fastsae.saes.sharding import Sharding, blocks
from fastsae_kernels import MSEL1, Impl, RaggedCode, SparseCode, mse_l1_loss, sparse_decode

LAYER_NORM_EPS = 1e-5  # SAELens's, added to the standard deviation on the way in only

T = TypeVar("T", bound="SAE")


@dataclass(frozen=True)
class SAELoss:
    """One training loss and what the trainer logs and counts from it."""

    total: Float[Tensor, ""]
    """Differentiable sum of the terms."""
    terms: dict[str, Tensor]
    """Each term as it enters the total, detached."""
    x: Float[Tensor, "B D"]
    err: Float[Tensor, "B D_out"]
    """x_hat - x, detached; for a transcoder, x_hat - target."""
    counts: Int[Tensor, " F"]
    """On how many rows each latent fired."""
    code: SparseCode | RaggedCode | None = None
    """The code, where it was made sparse."""
    target: Float[Tensor, "B D_out"] | None = None
    """What was reconstructed, where it is not x."""

    @property
    def x_hat(self) -> Float[Tensor, "B D_out"]:
        return (self.x if self.target is None else self.target) + self.err


class TrainingRows(NamedTuple):
    """Rows as a training loss takes them."""

    x: Float[Tensor, "B D"]
    """What is encoded: normalised, if that is done at run time."""
    target: Float[Tensor, "B D_out"]
    """What the decoder's output is compared to."""
    weight: Float[Tensor, " B"] | None
    """Of each row's squared error, where the target is not in the units of the input."""


def row_mean(rows: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    return rows.mean(0)


def warmed_up(coefficient: float, steps: int, step: int) -> float:
    """A coefficient at a step: linear from 0 over so many steps."""
    return coefficient if step >= steps else coefficient * step / steps


class SAE(nn.Module, ABC):
    """x_hat = decode(encode(x)), with W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D].

    W_enc has one latent contiguous (strides (1, D)): its shape is what every tool expects, its
    memory is one row a latent. `impl` picks the implementation of the ops at each call.

    Args:
        shards: where this object is one shard of a dictionary: the parameters that have a latent
            axis hold `latents` only, codes count from the first of them, and losses are those of
            the whole dictionary. None: all latents are here.
    """

    config_class: ClassVar[type[SAEConfig]]
    cfg: SAEConfig
    impl: Impl | str = Impl.AUTO
    WITHOUT_LATENT_AXIS: ClassVar[tuple[str, ...]] = ("b_dec", "W_skip", "topk_threshold")
    """Names in the state that a shard has whole."""
    splits_by_latent: ClassVar[bool] = True
    """Whether its loss can be computed by shards."""

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        device: torch.device | str = "cpu",
        shards: Sharding | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.shards = shards
        self.latents = range(cfg.d_sae) if shards is None else shards.latents
        """Those that this object holds."""
        self._make_parameters(getattr(torch, cfg.dtype), torch.device(device))
        self.compute_copies: dict[str, Tensor] = {}
        """W_enc and W_dec in the dtype of the products, kept up to date by whoever trains."""
        self._undo: tuple[Tensor, Tensor | None] | None = None
        self._heads: torch.Size | None = None

    def _make_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        W_dec = self._initial_rows(self.cfg.d_out, device)
        self.W_dec = nn.Parameter(W_dec.to(dtype))
        self.W_enc = nn.Parameter(W_dec.to(dtype).clone().t())
        self.b_enc = nn.Parameter(torch.zeros(len(self.latents), dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_out, dtype=dtype, device=device))

    def _initial_rows(self, width: int, device: torch.device) -> Float[Tensor, "F width"]:
        """Random directions of norm `decoder_init_norm`, one a latent.

        Drawn in blocks, those of other shards' latents too: a latent starts in the same direction
        wherever it is held.
        """
        rows = torch.empty(len(self.latents), width, device=device)
        if rows.is_meta:  # of a shape only, however large
            return rows
        for latents, held, place in blocks(self.cfg.d_sae, self.latents):
            drawn = torch.empty(len(latents), width, device=device)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            rows[place] = drawn[held]
        return rows.mul_(self.cfg.decoder_init_norm / rows.norm(dim=1, keepdim=True))

    @abstractmethod
    def encode_sparse(self, x: Float[Tensor, "... D"]) -> SparseCode | RaggedCode:
        """The active latents of each row and their acts."""

    @abstractmethod
    def loss(
        self, x: Float[Tensor, "B D"], dead: Bool[Tensor, " F"] | None = None, step: int = 0
    ) -> SAELoss:
        """The training loss.

        Args:
            x: rows, already normalised by the trainer.
            dead: latents that have not fired for a while, or None.
            step: number of training steps done, for coefficients that warm up.
        """

    @torch.no_grad()
    def initialise(
        self, rows: Float[Tensor, "N D"], *, centre: Callable[[Tensor], Tensor] = row_mean
    ) -> None:
        """Start from a sample of the rows: b_dec at their `centre`, their mean by default."""
        self.b_dec.copy_(centre(self._normalise(rows)))

    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense acts, zero where a latent is not active: for tools that expect [..., F]."""
        code = self.encode_sparse(x)
        lead = x.shape[:-2] if self.takes_heads_apart(x) else x.shape[:-1]
        return code.to_dense(self.cfg.d_sae).reshape(*lead, self.cfg.d_sae).to(x.dtype)

    def decode(self, acts: Float[Tensor, "... F"] | SparseCode | RaggedCode) -> Tensor:
        """x_hat of dense acts [..., F] or of a code; run-time normalisation is undone."""
        if isinstance(acts, Tensor):
            x_hat = self._decode_dense(acts)
        else:
            x_hat = sparse_decode(self.decoder_code(acts), self.W_dec, self.b_dec, impl=self.impl)
        return self._restore(x_hat)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """decode(encode(x)), without dense acts."""
        x_hat = self.decode(self.encode_sparse(x))
        return x_hat.reshape(x.shape).to(x.dtype)

    def pre_acts(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense (x - b_dec) W_enc + b_enc, before any rescaling by decoder norms; differentiable.

        For tools that read pre-activations: nothing in training calls it.
        """
        rows = self.prepare(x)
        return (rows if self.b_pre is None else rows - self.b_pre) @ self.W_enc + self.b_enc

    def acts_of(
        self, pre_acts: Float[Tensor, "... F"], x: Float[Tensor, "... D"]
    ) -> Float[Tensor, "... F"]:
        """Dense acts that pre-activations, changed or not, of rows x give; differentiable."""
        raise NotImplementedError(f"{type(self).__name__} has no acts of pre-activations")

    def decoder_code(self, code: SparseCode | RaggedCode) -> SparseCode | RaggedCode:
        """The acts that multiply W_dec's rows."""
        return code

    def _skipped(self, x: Tensor) -> Tensor | float:
        """What reaches the output around the latents."""
        return 0.0

    def _decode_dense(self, acts: Tensor) -> Tensor:
        return acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    @property
    def b_pre(self) -> Tensor | None:
        """What the encoder subtracts from its input."""
        return self._shared(self.b_dec) if self.cfg.apply_b_dec_to_input else None

    def _shared(self, parameter: Tensor) -> Tensor:
        """A parameter without a latent axis, where it is used for each latent."""
        return parameter if self.shards is None else self.shards.shared(parameter)

    def _over_latents(self, part: Tensor) -> Tensor:
        """A sum over latents, from that over the latents held here."""
        return part if self.shards is None else self.shards.total(part)

    def _over_parts(self, mean: Tensor) -> Tensor:
        """A mean over the batch, from that over the rows held here; not differentiable."""
        return mean if self.shards is None else self.shards.mean_of_parts(mean)

    @property
    def widest_shard(self) -> int:
        """Latents of the shard that has most."""
        return self.cfg.d_sae if self.shards is None else self.shards.widest

    def takes_heads_apart(self, x: Tensor) -> bool:
        """Whether the last two axes of x are [n_heads, d_head] of one row."""
        return self.cfg.reshape_activations == "hook_z" and x.shape[-1] != self.cfg.d_in

    def prepare(self, x: Tensor) -> Tensor:
        """Rows in the SAE's dtype, heads flattened and normalised as the configuration says."""
        return self._normalise(x.to(self.dtype))

    def _normalise(self, x: Tensor) -> Tensor:
        self._heads = x.shape[-2:] if self.takes_heads_apart(x) else None
        x = x if self._heads is None else x.flatten(-2)
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"x must have shape [..., D] with D = {self.cfg.d_in}, got {list(x.shape)}"
            )
        if self.cfg.normalize_activations == "constant_norm_rescale":
            factor = math.sqrt(self.cfg.d_in) / x.norm(dim=-1, keepdim=True)
            self._undo = (1 / factor, None)
            return x * factor
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            self._undo = (std, mean)
            return (x - mean) / (std + LAYER_NORM_EPS)
        return x

    def _restore(self, x_hat: Tensor) -> Tensor:
        """Undo what `prepare` did to the rows encoded last."""
        if self._undo is not None:
            factor, shift = self._undo
            x_hat = x_hat.reshape(*factor.shape[:-1], -1) * factor
            x_hat = x_hat if shift is None else x_hat + shift
        return x_hat if self._heads is None else x_hat.unflatten(-1, self._heads)

    def _training_rows(self, x: Tensor) -> "TrainingRows":
        """Rows in their own dtype, which is the product's."""
        z = self._normalise(x)
        if self._undo is None:
            return TrainingRows(z, z, None)
        factor, shift = self._undo
        # |factor x_hat + shift - x|^2 = factor^2 |x_hat - (x - shift) / factor|^2.
        target = (x.reshape(z.shape) - (0 if shift is None else shift)) / factor
        return TrainingRows(z, target, factor.squeeze(-1).square())

    def _reconstruction(
        self, rows: "TrainingRows", code: SparseCode | RaggedCode, l1_weight: Tensor | None = None
    ) -> MSEL1:
        """The losses of a code, in the units of the rows that were handed in."""
        mse, l1, err = mse_l1_loss(
            rows.target,
            code,
            self.W_dec,
            self.b_dec,
            l1_weight,
            row_weight=rows.weight,
            W_compute=self.compute_copies.get("W_dec"),
            shards=None if len(self.latents) == self.cfg.d_sae else self.shards,
            impl=self.impl,
        )
        if rows.weight is None:
            return MSEL1(mse, l1, err)
        return MSEL1(mse * rows.weight.mean(), l1, err * rows.weight.sqrt().unsqueeze(-1))

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def decoder_norms(self) -> Float[Tensor, " F"]:
        """[F] norms of W_dec's rows."""
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    @property
    def can_fold_W_dec_norm(self) -> bool:
        """Whether the decoder's norms can move into the encoder without changing the function."""
        return True

    @property
    def encoder_biases(self) -> list[Tensor]:
        """[F] each: what is added to products with W_enc and so scales with its columns."""
        return [self.b_enc]

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Give W_dec unit rows and the encoder their norms; x_hat stays what it was."""
        norms = self.decoder_norms().clamp_min(1e-8)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        for bias in self.encoder_biases:
            bias.mul_(norms)

    def inference_form(self) -> "SAE":
        """What is saved for use: this SAE, or the one it turns into once its training is over."""
        return self

    def _bias_gains(self) -> list[float | Tensor]:
        """What the product with W_enc is multiplied by before each of `encoder_biases`."""
        return [1.0]

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        """Make an SAE trained on `scale * x` one of x: sae(x) = old_sae(scale * x) / scale."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        if self.cfg.normalize_activations == "expected_average_only_in":
            self.cfg = replace(self.cfg, normalize_activations="none")

    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: Float[Tensor, " D"],
        matrix: Float[Tensor, "D D"],
        inverse: Float[Tensor, "D D"],
    ) -> None:
        """Make an SAE trained on z = (x - mean) matrix one of x.

        sae(x) = old_sae(z) inverse + mean. Computed in float64; weights keep their dtype.
        """
        wide = torch.float64
        W_enc = matrix @ self.W_enc.to(wide)
        if not self.cfg.apply_b_dec_to_input:
            for bias, gain in zip(self.encoder_biases, self._bias_gains(), strict=True):
                bias.copy_(bias.to(wide) - (mean @ W_enc) * gain)
        self.W_enc.copy_(W_enc)
        self.W_dec.copy_(self.W_dec.to(wide) @ inverse)
        self.b_dec.copy_(self.b_dec.to(wide) @ inverse + mean)
        if self.cfg.normalize_activations == "covariance_whitening":
            self.cfg = replace(self.cfg, normalize_activations="none")

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write `sae_weights.safetensors` and `cfg.json` in SAELens 6's format; both paths."""
        from fastsae.saes.native_format import write_sae

        return write_sae(self, Path(path))

    @classmethod
    def load_from_disk(cls: type[T], path: str | Path, device: torch.device | str = "cpu") -> T:
        """Read a folder in SAELens 6's format.

        Raises:
            FileNotFoundError: the folder or one of its two files is absent.
            ValueError: a file is truncated, or does not fit the configuration.
            TypeError: the folder holds another variant than this class.
        """
        from fastsae.saes.native_format import read_sae

        sae = read_sae(Path(path), device)
        if not isinstance(sae, cls):
            raise TypeError(f"path must hold a {cls.__name__}, got {type(sae).__name__} in {path}")
        return sae
