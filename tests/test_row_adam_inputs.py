"""What the row optimizer refuses: weights, moments and gradients that do not fit each other."""

from dataclasses import replace

import pytest
import torch

from fastsae_kernels import DenseGrad, row_adam, workspace
from fastsae_kernels._row_grads import PairGrad
from fastsae_kernels.optimizer import lazy_row_adam, row_grad_norm
from row_grads import device_for, pair_grad, start_of, subset_grad


def test_what_the_kernels_cannot_take_is_refused():
    device = device_for("triton")
    weight = torch.zeros(4, 3, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        row_adam(weight, [], weight.clone(), weight.clone(), step=1, lr=0.1, impl="triton")
    row_adam(weight, [], weight.clone(), weight.clone(), step=1, lr=0.1)


def test_bad_arguments_are_refused():
    weight = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="exp_avg must have weight's shape and strides"):
        row_adam(weight, [], torch.zeros(3, 4).t(), torch.zeros(4, 3), step=1, lr=0.1)
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        row_adam(weight, [], weight.clone(), weight.clone(), step=0, lr=0.1)
    with pytest.raises(ValueError, match=r"weight must be contiguous \[F, D\]"):
        row_adam(weight.t(), [], weight.t().clone(), weight.t().clone(), step=1, lr=0.1)
    zeros = torch.zeros_like
    with pytest.raises(TypeError, match="exp_avg_sq must be torch.bfloat16 or torch.float32, got"):
        row_adam(weight, [], zeros(weight), zeros(weight).half(), step=1, lr=0.1)
    with pytest.raises(TypeError, match="copy must be torch.bfloat16 or torch.float16, got"):
        row_adam(weight, [], *[zeros(weight)] * 2, step=1, lr=0.1, copy=zeros(weight))
    with pytest.raises(ValueError, match="copy must have weight's shape and strides"):
        row_adam(weight, [], *[zeros(weight)] * 2, step=1, lr=0.1, copy=zeros(weight)[:2].half())
    with pytest.raises(
        ValueError, match=r"grads\[0\] must be of weight's rows \[F, D\] = \[4, 3\]"
    ):
        lazy_row_adam(weight, [subset_grad(1)], *[zeros(weight)] * 2, step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"got \[12, 33\]"):
        row_grad_norm(weight, [pair_grad()])
    with pytest.raises(ValueError, match="grad_scale must be 0-dim"):
        row_adam(weight, [], *[zeros(weight)] * 2, step=1, lr=0.1, grad_scale=torch.ones(2))
    away = zeros(weight, device="meta")
    with pytest.raises(ValueError, match="weight on cpu, exp_avg on cpu, exp_avg_sq on meta"):
        row_adam(weight, [], zeros(weight), away, step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"weight on cpu, grads\[0\].values on meta"):
        row_adam(weight, [DenseGrad(away)], *[zeros(weight)] * 2, step=1, lr=0.1)
    wide, pairs = torch.zeros(12, 33), pair_grad()
    with pytest.raises(ValueError, match=r"grads\[0\].coef on meta"):
        row_grad_norm(wide, [PairGrad(pairs.groups, pairs.coef.to("meta"), pairs.operand)])
    with pytest.raises(ValueError, match="budget must be at least 1 MiB"), workspace(5):
        pass


def bad_grads():
    pairs, subset = pair_grad(), subset_grad(1, 4)
    groups = pairs.groups
    with_groups = lambda **parts: replace(pairs, groups=groups._replace(**parts))
    return {
        "latent": (
            subset_grad(1, 12),
            r"latents must be in \[0, F\) with F = 12",
        ),
        "order": (subset_grad(4, 1), "latents must ascend, got a step of -3"),
        "twice": (subset_grad(4, 4), "latents must ascend, got a step of 0"),
        "lengths": (
            replace(subset, values=subset.values[:1]),
            r"latents must have shape .* \[1\]",
        ),
        "float latents": (replace(subset, latents=torch.ones(2)), "latents must be int32 or int64"),
        "int values": (replace(subset, values=subset.values.int()), "values must be a floating"),
        "long coef": (replace(pairs, coef=torch.ones(61)), r"coef must have shape \[P\] = \[60\]"),
        "short coef": (replace(pairs, coef=torch.ones(59)), r"coef must have shape \[P\] = \[60\]"),
        "int coef": (replace(pairs, coef=pairs.coef.int()), "coef must be a floating dtype"),
        "int operand": (replace(pairs, operand=pairs.operand.int()), "operand must be a floating"),
        "short rows": (with_groups(rows=groups.rows[1:]), r"rows must have shape \[P\] = \[60\]"),
        "row": (with_groups(rows=groups.rows + 1), r"rows must be in \[0, B\) with B = 20, got"),
        "offsets": (with_groups(offsets=groups.offsets + 9), "offsets must rise from 0"),
        "fall": (
            with_groups(offsets=groups.offsets.flip(0)),
            "offsets must rise from 0",
        ),
    }


@pytest.mark.parametrize("name", bad_grads())
def test_bad_gradient_is_refused(name):
    grad, message = bad_grads()[name]
    weight, m, v = start_of()
    with pytest.raises((TypeError, ValueError), match=message):
        row_adam(weight, [grad], m, v, step=1, lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        row_grad_norm(weight, [grad])


def test_a_weight_that_is_not_floating_is_refused():
    weight = torch.zeros(4, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="weight must be a floating dtype"):
        row_adam(weight, [], weight.clone(), weight.clone(), step=1, lr=0.1)
