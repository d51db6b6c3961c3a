"""Adam for a dictionary: by rows without a dense gradient, or torch's own with a check."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.saes import SAE
from fastsae.training.config import OptimizerConfig
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
MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(sae: SAE, cfg: OptimizerConfig, lr: float) -> "RowAdam | PlainAdam":
    unit_rows = [sae.W_dec] if cfg.unit_norm_decoder else []
    shared: dict[str, Any] = {"lr": lr, "betas": cfg.betas, "eps": cfg.eps, "unit_rows": unit_rows}
    if cfg.kind == "adam":
        return PlainAdam(sae.parameters(), **shared)
    dictionary = [p for name, p in sae.named_parameters() if name in DICTIONARY]
    return RowAdam(sae.parameters(), dictionary, **shared)


def compute_copies(sae: SAE, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the dictionary in a narrower `dtype`, in its memory order; else none."""
    if dtype.itemsize >= sae.dtype.itemsize:
        return {}
    return {name: getattr(sae, name).detach().to(dtype) for name in ("W_enc", "W_dec")}


def restore_memory_order(like: Tensor, values: Tensor) -> Tensor:
    """`values` with the strides of `like`: files are row-major, W_enc is not."""
    return torch.empty_like(like, dtype=values.dtype).copy_(values)


def check_strides(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.stride() != parameter.stride():
        raise RuntimeError(
            f"{name} must have its parameter's strides {parameter.stride()}, got "
            f"{tensor.stride()}; restore them with restore_memory_order after loading"
        )


class PlainAdam(torch.optim.Adam):
    """torch.optim.Adam(fused=True), refusing gradients and moments in another memory order.

    On a CPU the fused kernel walks parameter, gradient and moments as flat memory and silently
    computes wrong numbers when their strides differ. Weights in `unit_rows` [F, D] move along the
    unit sphere: their gradient loses its component along each row, and rows get norm 1 again.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        unit_rows: Iterable[nn.Parameter] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(params, fused=True, **kwargs)
        self._unit_rows = list(unit_rows)
        self.copies: dict[nn.Parameter, Tensor] = {}
        """Of parameters, in another dtype: written anew at each step."""

    def release(self) -> None:
        """Nothing is held."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        return torch.linalg.vector_norm(torch.stack([g.norm() for g in self._gradients()]))

    def scale_gradient(self, factor: Tensor) -> None:
        for gradient in self._gradients():
            gradient.mul_(factor)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    check_strides("grad", p.grad, p)
                for name in MOMENTS:
                    if name in self.state[p]:
                        check_strides(name, self.state[p][name], p)
        with torch.no_grad():
            for p in self._unit_rows:
                if p.grad is not None:
                    along = (p.grad * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True)
                    p.grad.sub_(along.nan_to_num(0.0) * p)
        result = super().step(closure)
        with torch.no_grad():
            for p in self._unit_rows:
                norms = p.norm(dim=1, keepdim=True)
                p.div_(torch.where(norms > 0, norms, 1))
            for p, copy in self.copies.items():
                copy.copy_(p)
        return result


class RowAdam(torch.optim.Optimizer):
    """Adam whose dictionary gradients are summed row by row inside the step.

    For the weights of the dictionary backward leaves the pairs that make the gradient instead of
    `.grad`; the others have an ordinary gradient. Same numbers as `PlainAdam`, and `unit_rows` as
    there.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        dictionary: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_rows: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._unit_rows = set(unit_rows)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._row_grads = {p: collect_row_grads(p) for p in dictionary}
        self._factor: Tensor | None = None
        self.copies: dict[nn.Parameter, Tensor] = {}
        """Of parameters, in another dtype: written in the same pass as they are."""

    def release(self) -> None:
        """Give the weights back to ordinary autograd: backward fills `.grad` again."""
        for p in self._row_grads:
            release_row_grads(p)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        norms = [row_grad_norm(_rows(p), self._gradient(p)) for p in self._parameters]
        return torch.linalg.vector_norm(torch.stack(norms))

    def scale_gradient(self, factor: Tensor) -> None:
        """Multiply the gradient of the next step: the rows' is scaled as it is summed."""
        self._factor = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state.update({name: torch.zeros_like(p) for name in MOMENTS})
                for name in MOMENTS:
                    check_strides(name, state[name], p)
                state["step"] += 1
                copy = self.copies.get(p)
                row_adam(
                    _rows(p),
                    self._gradient(p),
                    *(_rows(state[name]) for name in MOMENTS),
                    step=int(state["step"]),
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    grad_scale=self._factor,
                    project=p in self._unit_rows,
                    renormalise=p in self._unit_rows,
                    copy=None if copy is None else _rows(copy),
                )
        self._factor = None

    def _gradient(self, p: nn.Parameter) -> list[RowGrad]:
        if p in self._row_grads:
            if p.grad is not None:
                raise RuntimeError(
                    f"grad must be None under RowAdam, got a dense gradient for the weight "
                    f"{list(p.shape)}: a loss reached it outside the fastsae ops; such a loss "
                    "trains with OptimizerConfig(kind='adam')"
                )
            return self._row_grads[p]
        return [] if p.grad is None else [DenseGrad(_rows(p.grad))]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for grads in self._row_grads.values():
            grads.clear()


def _rows(tensor: Tensor) -> Tensor:
    """The contiguous view of a weight with one latent a row; a bias becomes one column."""
    if tensor.ndim == 1:
        return tensor.unsqueeze(1)
    transposed = tensor.stride(0) == 1 and tensor.stride(1) == tensor.shape[0]
    return tensor.t() if transposed else tensor
