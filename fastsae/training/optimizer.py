"""Optimizers for a dictionary. `OPTIMIZERS` is the one list of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.distributed.gradients import Parts
from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAE
from fastsae.training import dense_optimizers
from fastsae.training.config import OptimizerConfig
from fastsae.training.dense_optimizers import DenseOptimizer
from fastsae.training.memory_order import check_strides, rows_of
from fastsae.training.narrow_state import new_moments, step_in_blocks
from fastsae_kernels import (
    DenseGrad,
    RowGrad,
    collect_row_grads,
    release_row_grads,
    row_adam,
    row_grad_norm,
)

DICTIONARY = ("W_enc", "W_dec")
"""Names of the weights with one latent a row."""

OPTIMIZERS: Mapping[str, Callable[[SAE, OptimizerConfig, float], list[torch.optim.Optimizer]]] = {
    "adam": dense_optimizers.adam,
    "signum": dense_optimizers.signum,
    "muon": dense_optimizers.muon,
}
"""Those of ordinary gradients, by `OptimizerConfig.kind`; `row_adam` is the one of pairs."""


def build_optimizer(
    sae: SAE, cfg: OptimizerConfig, lr: float, parts: Parts | None = None
) -> "RowAdam | DenseOptimizer":
    unit_rows = [sae.W_dec] if cfg.unit_norm_decoder else []
    if cfg.kind != "row_adam":
        return DenseOptimizer(OPTIMIZERS[cfg.kind](sae, cfg, lr), unit_rows, parts)
    dictionary = [p for name, p in sae.named_parameters() if name in DICTIONARY]
    return RowAdam(
        sae.parameters(),
        dictionary,
        lr=lr,
        betas=cfg.betas,
        eps=cfg.eps,
        unit_rows=unit_rows,
        moments=cfg.moments,
        rounding=cfg.rounding,
        parts=parts,
    )


def compute_copies(sae: SAE, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the dictionary in a narrower `dtype`, in its memory order; else none."""
    if dtype.itemsize >= sae.dtype.itemsize:
        return {}
    return {name: getattr(sae, name).detach().to(dtype) for name in ("W_enc", "W_dec")}


class RowAdam(torch.optim.Optimizer):
    """Adam whose dictionary gradients are summed row by row inside the step.

    For the weights of the dictionary backward leaves the pairs that make the gradient instead of
    `.grad`; the others have an ordinary gradient. Same numbers as `torch.optim.Adam`, and
    `unit_rows` as in `DenseOptimizer`. The dictionary's `moments` may be bf16 or 8 bits, and
    weights that are bf16 masters may be rounded stochastically (`narrow_state`).

    Args:
        parts: of the batch, where several processes have one each.
    """

    counts_on_device = False

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        dictionary: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_rows: Iterable[nn.Parameter] = (),
        moments: str = "float32",
        rounding: str = "nearest",
        parts: Parts | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._unit_rows = set(unit_rows)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._row_grads = {p: collect_row_grads(p) for p in dictionary}
        self._moments, self._rounding = moments, rounding
        self._parts = parts or Parts(Mesh(), "pairs")
        self._factor: Tensor | None = None
        self.copies: dict[nn.Parameter, Tensor] = {}
        """Of parameters, in another dtype: written in the same pass as they are."""

    def release(self) -> None:
        """Give the weights back to ordinary autograd: backward fills `.grad` again."""
        for p in self._row_grads:
            release_row_grads(p)

    @torch.no_grad()
    def combine(self) -> None:
        """Make the gradients of the parts of a batch, left by backward, that of the batch."""
        if self._parts.mesh.dp == 1:
            return
        shapes = [rows_of(p).shape for p in self._row_grads]
        self._parts.combined([*self._row_grads.values()], shapes)
        for p in self._parameters:
            if p.grad is not None:
                p.grad.copy_(self._parts.mean(p.grad))

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        norms = {p: row_grad_norm(self._rows(p), self._gradient(p)) for p in self._parameters}
        return self._parts.norm(norms, self._row_grads)

    def _rows(self, p: Tensor, copy: Tensor | None = None) -> Tensor:
        """The rows of a parameter, or of its copy, that are updated here."""
        rows = rows_of(p if copy is None else copy)
        return rows[self._parts.owned(len(rows))] if p in self._row_grads else rows

    def _splits(self, p: Tensor) -> bool:
        """Whether a parameter's state is that of the rows that this process updates only."""
        return p in self._row_grads and self._parts.splits_rows

    def scale_gradient(self, factor: Tensor) -> None:
        """Multiply the gradient of the next step: the rows' is scaled as it is summed."""
        self._factor = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    kind = self._moments if p in self._row_grads else "float32"
                    like = self._rows(p) if self._splits(p) else p
                    state.update({"step": torch.zeros(()), **new_moments(like, kind)})
                for name, value in state.items():
                    if value.shape == p.shape:
                        check_strides(name, value, p)
                state["step"] += 1
                self._update(p, state, group)
        self._factor = None

    def _update(self, p: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        copy = self.copies.get(p)
        options: dict[str, Any] = {
            **{name: group[name] for name in ("lr", "betas", "eps")},
            "step": int(state["step"]),
            "grad_scale": self._factor,
            "project": p in self._unit_rows,
            "renormalise": p in self._unit_rows,
            "copy": None if copy is None else self._rows(p, copy),
        }
        rows = self._rows(p)
        moments = {n: rows_of(t) if t.shape == p.shape else t for n, t in state.items()}
        rounded = self._rounding == "stochastic" and p.dtype == torch.bfloat16
        if rounded or "exp_avg_scale" in state:
            step_in_blocks(rows, self._gradient(p), moments, round_weight=rounded, **options)
        else:
            pair = (moments["exp_avg"], moments["exp_avg_sq"])
            row_adam(rows, self._gradient(p), *pair, **options)
        if self._splits(p):
            self._parts.spread(rows_of(p))
            if copy is not None:
                copy.copy_(p)

    def _gradient(self, p: nn.Parameter) -> list[RowGrad]:
        if p in self._row_grads:
            if p.grad is not None:
                raise RuntimeError(
                    f"grad must be None under RowAdam, got a dense gradient for the weight "
                    f"{list(p.shape)}: a loss reached it outside the fastsae ops; such a loss "
                    "trains with OptimizerConfig(kind='adam')"
                )
            return self._row_grads[p]
        return [] if p.grad is None else [DenseGrad(rows_of(p.grad))]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for grads in self._row_grads.values():
            grads.clear()
