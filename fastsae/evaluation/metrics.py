"""How well rows are reconstructed, and how the latents are used, summed in float64.

`DEFINITIONS` states every number. The sums are over rows, so that the result does not depend on
how the rows were cut into updates, but for three variants that are defined per batch; those are
what the named library prints when it is handed the same batches.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

DENSITY_PERCENTILES = (10, 50, 90)
DEFINITIONS = {
    "n_rows": "rows seen, N",
    "fvu": "sum ||e||^2 / sum ||x - mean x||^2, e = x - x_hat, the mean over all N rows",
    "mse": "mean over rows of ||e||^2",
    "nmse_openai": "mean over rows of ||e||^2 / ||x||^2",
    "ev_saelens": "1 - fvu",
    "ev_saelens_legacy": "mean over rows of 1 - ||e||^2 / ||x - batch mean||^2",
    "ev_sparsify": "mean over batches of 1 - sum ||e||^2 / sum ||x - batch mean||^2; also "
    "llamascopium's, and that of SAELens's log of a training",
    "ev_dictlearning": "mean over batches of 1 - sum_d var(e_d) / sum_d var(x_d)",
    "ev_saebench": "1 - mean ||e||^2 / (mean ||x||^2 - m^2), m = mean over d and batches of the "
    "batch mean of x_d^2: SAEBench 0.6.0 as it is coded, squares where means were meant",
    "ev_openai": "1 - mean ||e||^2 / s, s = mean over the first batch of ||x - batch mean||^2",
    "ev_overcomplete": "1 - sum ||e||^2 / sum ||x - c||^2, c = the mean of all numbers in all rows",
    "cosine_similarity": "mean over rows of <x, x_hat> / (||x|| ||x_hat||)",
    "l2_ratio": "mean over rows of ||x_hat|| / ||x||: shrinkage is 1 minus this",
    "relative_reconstruction_bias": "sum ||x_hat||^2 / sum <x, x_hat>",
    "l0": "mean over rows of the number of latents with act != 0",
    "dead_fraction": "fraction of the latents with act == 0 in all N rows",
    **{
        f"density_p{percent}": f"the density that {percent} % of the latents do not exceed, a "
        "latent's density being the fraction of the N rows with act != 0"
        for percent in DENSITY_PERCENTILES
    },
    "density_max": "the largest density of a latent",
}

_CHUNK_ROWS = 1024
_SUMS = (
    *("e2", "x2", "xhat2", "dot", "nmse", "cosine", "l2_ratio", "legacy", "sparsify", "dict"),
    *("mean_squares", "first_spread"),
)


class ReconstructionMetrics:
    """Running sums over rows; `result()` gives the numbers that `DEFINITIONS` states.

    Args:
        d_in: width of the rows, D.
        d_sae: number of latents, F; None leaves out `l0`, `dead_fraction` and the densities.
    """

    def __init__(self, d_in: int, d_sae: int | None = None) -> None:
        if d_in < 1 or (d_sae is not None and d_sae < 1):
            raise ValueError(f"d_in and d_sae must be at least 1, got {d_in} and {d_sae}")
        self.d_in, self.d_sae = d_in, d_sae
        self._n_rows = self._n_batches = 0
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in _SUMS}
        self._sum_x = torch.zeros(d_in, dtype=torch.float64)
        self._fired = torch.zeros(d_sae or 0, dtype=torch.int64)

    def update(
        self,
        x: Float[Tensor, "... D"],
        x_hat: Float[Tensor, "... D"],
        indices: Int[Tensor, "..."] | None = None,
        acts: Float[Tensor, "..."] | None = None,
    ) -> None:
        """Add rows, and with `d_sae` their codes.

        Args:
            indices: latents of all active entries, `[.., K]` or flat; an entry fires iff its act
                is not 0.
            acts: their activations, of the same shape.

        Raises:
            ValueError: shapes that do not agree, a code without `d_sae` or the reverse, a latent
                out of range.
        """
        if x.shape != x_hat.shape or x.shape[-1:] != (self.d_in,):
            raise ValueError(
                f"x and x_hat must have the same shape [.., D] with D = {self.d_in}, "
                f"got {list(x.shape)} and {list(x_hat.shape)}"
            )
        x, x_hat = (t.detach().reshape(-1, self.d_in) for t in (x, x_hat))
        if x.device.type == "mps":  # no float64 there
            x, x_hat = x.cpu(), x_hat.cpu()
        if len(x) == 0:
            return
        fired = self._count(indices, acts)
        self._move_to(x.device)
        self._add_rows(x, x_hat)
        if fired is not None:
            self._fired += fired.to(x.device)
        self._n_rows += len(x)
        self._n_batches += 1

    def result(self) -> dict[str, float]:
        """Every number of `DEFINITIONS`; NaN where a denominator is 0.

        Raises:
            RuntimeError: no row was added.
        """
        if self._n_rows == 0:
            raise RuntimeError("metrics need at least one row, got none; call update first")
        n, sums = self._n_rows, self._sums
        centred = sums["x2"] - self._sum_x.square().sum() / n
        fvu = sums["e2"] / centred
        mse, m = sums["e2"] / n, sums["mean_squares"] / self._n_batches
        about_one_number = sums["x2"] - self._sum_x.sum().square() / (n * self.d_in)
        values = {
            "n_rows": n,
            "fvu": fvu,
            "mse": mse,
            "nmse_openai": sums["nmse"] / n,
            "ev_saelens": 1 - fvu,
            "ev_saelens_legacy": sums["legacy"] / n,
            "ev_sparsify": sums["sparsify"] / self._n_batches,
            "ev_dictlearning": sums["dict"] / self._n_batches,
            "ev_saebench": 1 - mse / (sums["x2"] / n - m.square()),
            "ev_openai": 1 - mse / sums["first_spread"],
            "ev_overcomplete": 1 - sums["e2"] / about_one_number,
            "cosine_similarity": sums["cosine"] / n,
            "l2_ratio": sums["l2_ratio"] / n,
            "relative_reconstruction_bias": sums["xhat2"] / sums["dot"],
        }
        if self.d_sae is not None:
            values["l0"] = self._fired.sum() / n
            values["dead_fraction"] = (self._fired == 0).double().mean()
            densities = self.density.sort().values
            for percent in DENSITY_PERCENTILES:
                values[f"density_p{percent}"] = densities[-(-percent * self.d_sae // 100) - 1]
            values["density_max"] = densities[-1]
        return {name: float(value) for name, value in values.items()}

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Fraction of the rows in which each latent fires, float64."""
        if self.d_sae is None or self._n_rows == 0:
            raise RuntimeError(
                "density needs d_sae and at least one row, "
                f"got d_sae={self.d_sae} and {self._n_rows} rows"
            )
        return self._fired.double() / self._n_rows

    def _add_rows(self, x: Tensor, x_hat: Tensor) -> None:
        """Sums of one batch, in chunks so that float64 copies stay small."""
        n, sums = len(x), self._sums
        batch_mean = x.mean(dim=0, dtype=torch.float64)
        e2_batch, x2_batch, centred_batch = (torch.zeros_like(sums["e2"]) for _ in range(3))
        sum_e = torch.zeros_like(batch_mean)
        for x_part, x_hat_part in zip(x.split(_CHUNK_ROWS), x_hat.split(_CHUNK_ROWS), strict=True):
            a, b = x_part.double(), x_hat_part.double()
            e = a - b
            e2, a2, b2 = (t.square().sum(dim=1) for t in (e, a, b))
            dot, centred = (a * b).sum(dim=1), (a - batch_mean).square().sum(dim=1)
            x2_batch += a2.sum()
            sums["xhat2"] += b2.sum()
            sums["dot"] += dot.sum()
            sums["nmse"] += (e2 / a2).sum()
            sums["cosine"] += (dot / (a2 * b2).sqrt().clamp_min(1e-300)).sum()
            sums["l2_ratio"] += (b2 / a2).sqrt().sum()
            sums["legacy"] += (1 - e2 / centred).sum()
            e2_batch += e2.sum()
            centred_batch += centred.sum()
            sum_e += e.sum(dim=0)
            self._sum_x += a.sum(dim=0)
        sums["e2"] += e2_batch
        sums["x2"] += x2_batch
        sums["mean_squares"] += x2_batch / x.numel()
        if self._n_batches == 0:
            sums["first_spread"] += centred_batch / n
        sums["sparsify"] += 1 - e2_batch / centred_batch
        sums["dict"] += 1 - (e2_batch - sum_e.square().sum() / n) / centred_batch

    def _count(self, indices: Tensor | None, acts: Tensor | None) -> Tensor | None:
        """How often each latent fires [F] in one batch."""
        given = indices is not None, acts is not None
        if given != (self.d_sae is not None,) * 2:
            raise ValueError(
                "indices and acts must both be given iff d_sae is, "
                f"got {given[0]} and {given[1]} with d_sae={self.d_sae}"
            )
        if indices is None or acts is None or self.d_sae is None:
            return None
        if indices.shape != acts.shape:
            raise ValueError(
                "indices and acts must have the same shape, "
                f"got {list(indices.shape)} and {list(acts.shape)}"
            )
        active = indices[acts != 0]
        if active.numel() and not (active.min() >= 0 and active.max() < self.d_sae):
            raise ValueError(
                f"indices must be from 0 to F - 1 = {self.d_sae - 1}, "
                f"got {int(active.min())} to {int(active.max())}"
            )
        return torch.bincount(active, minlength=self.d_sae)

    def _move_to(self, device: torch.device) -> None:
        if self._sum_x.device != device:
            self._sums = {name: value.to(device) for name, value in self._sums.items()}
            self._sum_x, self._fired = self._sum_x.to(device), self._fired.to(device)
