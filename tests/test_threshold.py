import pytest
import torch

from fastsae_kernels import relu_l1_loss, threshold_encode, workspace
from parity import SHAPES, Shape, all_in, check_parity, weights


@pytest.mark.parametrize("lp_norm", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
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
    inputs = {k: v.float() for k, v in weights(Shape(400, 16, 900, 1)).items()}
    arguments = [inputs[k] for k in ("x", "W_enc", "b_enc", "W_dec", "b_dec")]
    whole = relu_l1_loss(*arguments, l1_coefficient=0.1)
    with workspace(1 << 20):
        parts = relu_l1_loss(*arguments, l1_coefficient=0.1)
    assert torch.allclose(whole.total, parts.total, rtol=1e-5)
    assert torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize("threshold", [0.0, 0.75])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_matches_reference(shape, threshold):
    inputs = weights(shape)
    found = {
        impl: threshold_encode(
            inputs["x"],
            inputs["W_enc"],
            inputs["b_enc"],
            threshold=threshold,
            b_pre=inputs["b_dec"],
            impl=impl,
        )
        for impl in ("eager", "reference")
    }
    for eager, reference in zip(found["eager"], found["reference"], strict=True):
        assert torch.equal(eager, reference)


def test_nan_counts_as_above():
    code = threshold_encode(torch.tensor([[torch.nan]]), torch.ones(1, 3), torch.zeros(3))
    assert code.acts.isnan().all() and code.row_offsets.tolist() == [0, 3]


def test_bad_arguments_are_refused():
    good = (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5))
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        threshold_encode(*good, threshold=-1.0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\]"):
        threshold_encode(torch.ones(1, 2, 3), *good[1:])
    with pytest.raises(ValueError, match=r"W_dec must have shape \[F, D\] = \[5, 3\]"):
        relu_l1_loss(*good, torch.ones(4, 3), torch.ones(3), l1_coefficient=1.0)
    with pytest.raises(ValueError, match="lp_norm must be above 0, got 0"):
        relu_l1_loss(*good, torch.ones(5, 3), torch.ones(3), l1_coefficient=1.0, lp_norm=0.0)
