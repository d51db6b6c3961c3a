"""What the trainer does to rows so that every model's look alike, undone in the saved weights."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.saes import SAE
from fastsae.saes.config import Normalization
from fastsae.saes.transcoder import Transcodes

WHITENING_RIDGE = 1e-3  # SAELens's, added to each eigenvalue


class Scaling:
    """Rows as they are; the base of what can be done to them.

    `fit` looks at a sample, `apply` maps rows, `fold` makes an SAE of mapped rows one of rows.
    """

    def fit(
        self, rows: Float[Tensor, "N D"], targets: Float[Tensor, "N D_out"] | None = None
    ) -> None:
        """Set what depends on the data; `targets` are a transcoder's."""

    def apply(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x

    def apply_to_targets(self, y: Float[Tensor, "B D_out"]) -> Float[Tensor, "B D_out"]:
        return y

    def fold(self, sae: SAE) -> None:
        """Make `sae`, trained on mapped rows, take rows as they are."""

    def unfold(self, sae: SAE) -> None:
        """Make `sae`, which takes rows as they are, one of mapped rows: where training goes on."""

    def as_used(self, sae: SAE) -> SAE:
        """Fold what can be folded into `sae`, which changes, and give it the form it is used in."""
        self.fold(sae)
        if sae.can_fold_W_dec_norm:
            sae.fold_W_dec_norm()
        return sae.inference_form()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with what a sample gave an earlier run."""


class AverageNorm(Scaling):
    """x -> s x with s = sqrt(D) / mean |x|; targets likewise, by a factor of their own."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.target_factor = 1.0

    def fit(
        self, rows: Float[Tensor, "N D"], targets: Float[Tensor, "N D_out"] | None = None
    ) -> None:
        self.factor = _to_root_of_width(rows)
        self.target_factor = 1.0 if targets is None else _to_root_of_width(targets)

    def apply(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x * self.factor

    def apply_to_targets(self, y: Float[Tensor, "B D_out"]) -> Float[Tensor, "B D_out"]:
        return y * self.target_factor

    def fold(self, sae: SAE) -> None:
        if isinstance(sae, Transcodes):
            sae.fold_activation_scale(self.factor, self.target_factor)
        else:
            sae.fold_activation_scale(self.factor)

    def unfold(self, sae: SAE) -> None:
        cfg = sae.cfg
        if isinstance(sae, Transcodes):
            sae.fold_activation_scale(1 / self.factor, 1 / self.target_factor)
        else:
            sae.fold_activation_scale(1 / self.factor)
        sae.cfg = cfg

    def state_dict(self) -> dict[str, Tensor]:
        factors = {"factor": self.factor, "target_factor": self.target_factor}
        return {name: torch.tensor(f, dtype=torch.float64) for name, f in factors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor, self.target_factor = float(state["factor"]), float(state["target_factor"])


def _to_root_of_width(rows: Tensor) -> float:
    norm = float(rows.norm(dim=-1).mean())
    if norm == 0:
        raise ValueError("activations must not all be 0 to be scaled, got a mean norm of 0")
    return math.sqrt(rows.shape[-1]) / norm


class Whitening(Scaling):
    """x -> z = (x - mean) E (L + ridge)^(-1/2), with the sample covariance C = E L E^T, in fp64."""

    def __init__(self) -> None:
        self.mean = self.matrix = self.inverse = torch.empty(0, dtype=torch.float64)

    def fit(
        self, rows: Float[Tensor, "N D"], targets: Float[Tensor, "N D_out"] | None = None
    ) -> None:
        if targets is not None:
            raise ValueError(
                "normalize_activations must be 'none' or 'expected_average_only_in' for a "
                "transcoder, got 'covariance_whitening'"
            )
        if len(rows) < 2:
            raise ValueError(f"rows must be at least 2 to be whitened, got {len(rows)}")
        wide = rows.double()
        self.mean = wide.mean(0)
        eigenvalues, vectors = torch.linalg.eigh(torch.cov(wide.t()))
        roots = (eigenvalues.clamp_min(0) + WHITENING_RIDGE).sqrt()
        self.matrix, self.inverse = vectors / roots, (vectors * roots).t().contiguous()

    def apply(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        self._move_to(x.device)
        return (x - self.mean.to(x.dtype)) @ self.matrix.to(x.dtype)

    def fold(self, sae: SAE) -> None:
        self._move_to(sae.device)
        sae.fold_activation_whitening(self.mean, self.matrix, self.inverse)

    def unfold(self, sae: SAE) -> None:
        cfg = sae.cfg
        self._move_to(sae.device)
        sae.fold_activation_whitening(-self.mean @ self.matrix, self.inverse, self.matrix)
        sae.cfg = cfg

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.matrix, self.inverse = (
            state[name] for name in ("mean", "matrix", "inverse")
        )

    def _move_to(self, device: torch.device) -> None:
        """Where the rows are: what a checkpoint gave is on the CPU."""
        self.mean, self.matrix, self.inverse = (
            t.to(device) for t in (self.mean, self.matrix, self.inverse)
        )


def build_scaling(normalize_activations: Normalization) -> Scaling:
    """What a configuration's `normalize_activations` leaves to the trainer."""
    kinds = {"expected_average_only_in": AverageNorm, "covariance_whitening": Whitening}
    return kinds.get(normalize_activations, Scaling)()
