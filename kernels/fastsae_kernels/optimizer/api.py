import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsae_kernels._checks import (
    check_float,
    check_int,
    check_same_device,
    check_shape,
    check_within,
    values_are_checked,
)
from fastsae_kernels._dispatch import Impl, resolve_impl
from fastsae_kernels._row_grads import PairGrad, RowGrad, SubsetGrad
from fastsae_kernels.optimizer.update import RowState, Rule, store


@torch.no_grad()
def row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    project: bool = False,
    renormalise: bool = False,
    copy: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> None:
    """One Adam step of a dictionary's rows, in place, without its dense gradient ever existing.

        g = grad_scale * sum of grads;                            g -= (g.w / w.w) w   if project
        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        w -= lr * (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps);   w /= |w|   if renormalise

    Every row w moves, touched or not: the numbers are those of `torch.optim.Adam`. The gradient of
    a row (`triton`: in registers) or of a block of rows (`eager`: in cache) is summed, used and
    discarded. Rows of more than 8,192 columns go through a buffer of 64 MiB in `triton` too.

    Args:
        weight: [F, D], contiguous, or [F, T, D] for T targets: one row is then of T D numbers, and
            its gradients are [F, T D]. A bf16 or fp16 weight is widened for the arithmetic and
            rounded to nearest: give the fp32 master here and have `copy` written.
        grads: what backward left in `weight.row_grads`, of any number of loss terms and
            micro-batches: their sum is one gradient.
        exp_avg, exp_avg_sq: of weight's shape, contiguous, each in weight's dtype or bf16; bf16
            moments are rounded stochastically, by a hash of element and step, since to nearest they
            freeze.
        step: number of this step, from 1.
        grad_scale: 0-dim factor on the gradient (clipping), or None for 1.
        project: take off each row's gradient its component along the row; a zero row keeps all.
        renormalise: scale each row to unit norm after the update; a zero row stays.
        copy: of weight's shape, contiguous, bf16 or fp16: receives the new weight, or None.
        impl: `auto`, `triton`, `eager` or `reference`.

    Raises:
        ValueError: shapes, memory orders or devices differ, `step` is under 1, or a gradient names
            rows that are not there or out of order (on a GPU the last two are only looked at inside
            `index_checks`).
        TypeError: a tensor has another dtype than allowed.
    """
    state = RowState(weight, exp_avg, exp_avg_sq, copy)
    rule = Rule(step, lr, betas, eps, grad_scale, project, renormalise)
    state = _checked(state, grads, rule)
    which = _resolve(weight, grads, impl)
    if which is Impl.REFERENCE:
        from fastsae_kernels.optimizer.reference import row_adam as run

        return _run_wide(run, state, grads, rule)
    if which is Impl.TRITON:
        from fastsae_kernels.optimizer.kernel import row_adam as run
    else:
        from fastsae_kernels.optimizer.eager import row_adam as run
    run(state, grads, rule)


@torch.no_grad()
def lazy_row_adam(
    weight: Tensor,
    grads: Sequence[RowGrad],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    project: bool = False,
    renormalise: bool = False,
    copy: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> None:
    """One step of *another* optimizer: only rows that a pair or a subset touches move.

    The others keep weight, moments and copy, which costs no traffic: the moments of a latent that
    did not fire do not decay, and no momentum carries its row on. That is `torch.optim.SparseAdam`,
    whose numbers these are, and not Adam: results of `row_adam` do not carry over. Like there, all
    rows share one step count and eps is added before the second moment's bias correction,

        w -= lr sqrt(1 - b2^step) / (1 - b1^step) * m / (sqrt(v) + eps).

    A row whose gradient happens to be zero though a pair touches it moves; a `DenseGrad` touches
    every row. Arguments and errors are those of `row_adam`.
    """
    state = RowState(weight, exp_avg, exp_avg_sq, copy)
    rule = Rule(step, lr, betas, eps, grad_scale, project, renormalise)
    state = _checked(state, grads, rule)
    if not grads:
        return
    which = _resolve(weight, grads, impl)
    rule = rule._replace(eps=eps / math.sqrt(1 - betas[1] ** step))
    if which is Impl.REFERENCE:
        from fastsae_kernels.optimizer.reference import lazy_row_adam as run

        return _run_wide(run, state, grads, rule)
    if which is Impl.TRITON:
        from fastsae_kernels.optimizer.kernel import lazy_row_adam as run
    else:
        from fastsae_kernels.optimizer.eager import lazy_row_adam as run
    run(state, grads, rule)


@torch.no_grad()
def row_grad_norm(
    weight: Tensor, grads: Sequence[RowGrad], *, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """0-dim Euclidean norm of the summed gradient of `weight`, before any projection.

    Exact: the gradient is summed once more, row by row or block by block, and not written.
    """
    weight = _rows_of(weight)
    _check_grads(weight, grads)
    which = _resolve(weight, grads, impl)
    if which is Impl.REFERENCE:
        from fastsae_kernels.optimizer.reference import row_grad_norm as run
    elif which is Impl.TRITON:
        from fastsae_kernels.optimizer.kernel import row_grad_norm as run
    else:
        from fastsae_kernels.optimizer.eager import row_grad_norm as run
    return run(weight, grads)


def _resolve(weight: Tensor, grads: Sequence[RowGrad], impl: Impl | str) -> Impl:
    parts = [grad.operand if isinstance(grad, PairGrad) else grad.values for grad in grads]
    return resolve_impl(impl, weight.device, dtypes=[weight.dtype, *(t.dtype for t in parts)])


def _run_wide(
    run: Callable[..., None], state: RowState, grads: Sequence[RowGrad], rule: Rule
) -> None:
    """The reference knows one dtype, fp32 at least: narrower tensors are read and stored here."""
    weight, exp_avg, exp_avg_sq, copy = state
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, m, v = (t.to(dtype) for t in (weight, exp_avg, exp_avg_sq))
    run(w, grads, m, v, copy=copy, **rule._asdict())
    rows = torch.arange(len(weight), device=weight.device)
    store(state._replace(copy=None), w, m, v, rows, rule.step)


def _checked(state: RowState, grads: Sequence[RowGrad], rule: Rule) -> RowState:
    """The state's rows as views [F, D]."""
    weight, *others = state
    rows = _rows_of(weight)
    dtypes = {weight.dtype, torch.bfloat16}
    for name, tensor in zip(state._fields[1:], others, strict=True):
        if tensor is None:
            continue
        if tensor.shape != weight.shape or tensor.stride() != weight.stride():
            raise ValueError(
                f"{name} must have weight's shape and strides {list(weight.shape)}, "
                f"{weight.stride()}, got {list(tensor.shape)}, {tensor.stride()}"
            )
        allowed = {torch.float16, torch.bfloat16} if name == "copy" else dtypes
        if tensor.dtype not in allowed:
            names = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if not weight.is_contiguous():
        raise ValueError(
            "weight must be contiguous [F, D] or [F, T, D], "
            f"got {list(weight.shape)}, strides {weight.stride()}"
        )
    if rule.step < 1:
        raise ValueError(f"step must be at least 1, got {rule.step}")
    if rule.grad_scale is not None and rule.grad_scale.numel() != 1:
        raise ValueError(f"grad_scale must be 0-dim, got {list(rule.grad_scale.shape)}")
    check_same_device(**state._asdict(), grad_scale=rule.grad_scale)
    _check_grads(rows, grads)
    copy = None if state.copy is None else state.copy.flatten(1)
    return RowState(rows, state.exp_avg.flatten(1), state.exp_avg_sq.flatten(1), copy)


def _rows_of(weight: Tensor) -> Tensor:
    check_float("weight", weight)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have shape [F, D] or [F, T, D], got {list(weight.shape)}")
    return weight.flatten(1)


def _tensors_of(grad: RowGrad) -> dict[str, Tensor]:
    if isinstance(grad, PairGrad):
        return {**grad.groups._asdict(), "coef": grad.coef, "operand": grad.operand}
    return vars(grad)


def _check_grads(weight: Tensor, grads: Sequence[RowGrad]) -> None:
    for i, grad in enumerate(grads):
        parts = {f"grads[{i}].{name}": tensor for name, tensor in _tensors_of(grad).items()}
        check_same_device(weight=weight, **parts)
        if isinstance(grad, PairGrad):
            _check_pairs(f"grads[{i}]", grad)
            got = [grad.groups.offsets.numel() - 1, grad.operand.shape[1]]
        else:
            check_float(f"grads[{i}].values", grad.values)
            if isinstance(grad, SubsetGrad):
                _check_subset(f"grads[{i}]", grad, len(weight))
            got = [len(weight) if isinstance(grad, SubsetGrad) else len(grad.values)]
            got += grad.values.shape[1:]
        if got != list(weight.shape):
            raise ValueError(
                f"grads[{i}] must be of weight's rows [F, D] = {list(weight.shape)}, got {got}; "
                "a weight whose memory is column-major is passed transposed"
            )


def _check_pairs(name: str, grad: PairGrad) -> None:
    pairs, rows, offsets = grad.groups
    check_float(f"{name}.coef", grad.coef)
    check_float(f"{name}.operand", grad.operand)
    check_shape(f"{name}.operand", grad.operand, "[B, D]", (None, None))
    check_shape(f"{name}.coef", grad.coef, "[P]", (len(pairs),))
    check_shape(f"{name}.groups.rows", rows, "[P]", (len(pairs),))
    if not values_are_checked(rows):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > len(rows) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{name}.groups.offsets must rise from 0 to at most P = {len(rows)}, "
            f"got {first} to {last}"
        )
    check_within(f"{name}.groups.rows", rows, "B", len(grad.operand))


def _check_subset(name: str, grad: SubsetGrad, n_rows: int) -> None:
    latents = grad.latents
    check_int(f"{name}.latents", latents)
    check_shape(f"{name}.latents", latents, "[n] with values' n", (len(grad.values),))
    check_within(f"{name}.latents", latents, "F", n_rows)
    if values_are_checked(latents) and len(latents) > 1 and (step := int(latents.diff().min())) < 1:
        raise ValueError(f"{name}.latents must ascend, got a step of {step}")
