"""The loss of a ReLU SAE, which is made a chunk of rows at a time."""

import pytest
import torch

from encodes import DTYPES, encoder, fp32, ids
from fastsae_kernels import relu_l1_loss, workspace
from parity import SHAPES, Shape, all_in, check_parity, weights

pytestmark = pytest.mark.usefixtures("made_where_kernels_run")


@pytest.mark.parametrize("lp_norm", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_match_reference(shape, dtype, lp_norm):
    def losses(i, impl):
        arguments = (i["x"].detach(), i["W_enc"], i["b_enc"], i["W_dec"], i["b_dec"])
        extra = {"lp_norm": lp_norm, "b_pre": i["b_dec"], "impl": impl}
        mse_only = relu_l1_loss(*arguments, l1_coefficient=0.0, **extra)
        both = relu_l1_loss(*arguments, l1_coefficient=0.5, **extra)
        return {
            "mse": mse_only.total,
            "both": both.total,
            "l1": both.l1,
            "err": both.err,
            "counts": both.counts,
        }

    check_parity(losses, weights(shape), all_in(dtype))


def test_chunks_of_rows_change_nothing_but_rounding():
    arguments = encoder(fp32(Shape(400, 16, 900, 1)), "W_dec", "b_dec")
    whole = relu_l1_loss(*arguments, l1_coefficient=0.1)
    with workspace(1 << 20):
        parts = relu_l1_loss(*arguments, l1_coefficient=0.1)
    assert torch.allclose(whole.total, parts.total, rtol=1e-5)
    assert torch.equal(whole.counts, parts.counts)


def test_loss_without_a_gradient_is_the_same():
    arguments = encoder(fp32(SHAPES[0]), "W_dec", "b_dec")
    arguments[1].requires_grad_()
    learning = relu_l1_loss(*arguments, l1_coefficient=0.1)
    with torch.no_grad():
        constant = relu_l1_loss(*arguments, l1_coefficient=0.1)
    assert learning.total.requires_grad and not constant.total.requires_grad
    assert torch.equal(learning.total, constant.total)
