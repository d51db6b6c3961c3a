"""Optimizers of ordinary gradients: torch's Adam and Muon, and signum.

A new one is a function here that lists torch optimizers over the SAE's parameters, and a line in
`optimizer.OPTIMIZERS`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.distributed.gradients import Parts
from fastsae.distributed.mesh import Mesh
from fastsae.saes import SAE
from fastsae.training.config import OptimizerConfig
from fastsae.training.memory_order import check_strides


class DenseOptimizer:
    """torch optimizers over disjoint parameters, stepped together, with what a dictionary needs.

    Gradients and moments in another memory order than their parameter are refused: torch's fused
    kernels on a CPU walk all three as flat memory and silently compute wrong numbers. Weights in
    `unit_rows` [F, D] move along the unit sphere: their gradient loses its component along each
    row, and rows get norm 1 again.
    """

    counts_on_device = True
    """Where torch's fused Adam keeps the step."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        unit_rows: Iterable[nn.Parameter] = (),
        parts: Parts | None = None,
    ) -> None:
        self._optimizers = list(optimizers)
        self._parts = parts or Parts(Mesh(), "pairs")
        self._unit_rows = list(unit_rows)
        self.param_groups = [g for one in self._optimizers for g in one.param_groups]
        self.state = self._optimizers[0].state
        for one in self._optimizers[1:]:
            one.state = self.state
        self.copies: dict[nn.Parameter, Tensor] = {}
        """Of parameters, in another dtype: written anew at each step."""

    def release(self) -> None:
        """Nothing is held."""

    def zero_grad(self) -> None:
        for one in self._optimizers:
            one.zero_grad()

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [(p, p.grad) for p in parameters if p.grad is not None]

    @torch.no_grad()
    def combine(self) -> None:
        """Make the gradients of the parts of a batch, left by backward, that of the batch."""
        if self._parts.mesh.dp == 1:
            return
        for _, gradient in self._gradients():
            gradient.copy_(self._parts.mean(gradient))

    def gradient_norm(self) -> Tensor:
        return self._parts.norm({p: g.norm() for p, g in self._gradients()}, ())

    def scale_gradient(self, factor: Tensor) -> None:
        for _, gradient in self._gradients():
            gradient.mul_(factor)

    @torch.no_grad()
    def step(self) -> None:
        for p, gradient in self._gradients():
            check_strides("grad", gradient, p)
            for name, value in self.state[p].items():
                if value.shape == p.shape:
                    check_strides(name, value, p)
        for p in self._unit_rows:
            if p.grad is not None:
                along = (p.grad * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True)
                p.grad.sub_(along.nan_to_num(0.0) * p)
        for one in self._optimizers:
            one.step()
        for p in self._unit_rows:
            norms = p.norm(dim=1, keepdim=True)
            p.div_(torch.where(norms > 0, norms, 1))
        for p, copy in self.copies.items():
            copy.copy_(p)


class Signum(torch.optim.Optimizer):
    """w -= lr sign(m), m = beta m + (1 - beta) g: Bernstein et al. 2018, arXiv 1802.04434."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, beta: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - group["beta"])
                p.sub_(moment.sign(), alpha=group["lr"])


def adam(sae: SAE, cfg: OptimizerConfig, lr: float) -> list[torch.optim.Optimizer]:
    """torch.optim.Adam(fused=True)."""
    return [_adam(sae.parameters(), cfg, lr)]


def signum(sae: SAE, cfg: OptimizerConfig, lr: float) -> list[torch.optim.Optimizer]:
    """The sign of the first moment, with the first of the betas."""
    return [Signum(sae.parameters(), lr, cfg.betas[0])]


def muon(sae: SAE, cfg: OptimizerConfig, lr: float) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon for matrices, scaled to the size of Adam's updates; Adam for biases.

    Raises:
        ImportError: torch is older than 2.9, which brought Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"kind 'muon' needs torch 2.9 or newer, got {torch.__version__}")
    matrices = [p for p in sae.parameters() if p.ndim == 2]
    others = [p for p in sae.parameters() if p.ndim != 2]
    orthogonal = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [orthogonal, _adam(others, cfg, lr)]


def _adam(params: Iterable[nn.Parameter], cfg: OptimizerConfig, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(params, lr=lr, betas=cfg.betas, eps=cfg.eps, fused=True)
