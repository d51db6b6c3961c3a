"""What backward reads where the forward pass read half precision."""

import pytest
import torch

from fastsae_kernels import collect_row_grads, mse_l1_loss, topk_encode
from fastsae_kernels._dispatch import TRITON_INSTALLED
from fastsae_kernels._row_grads import PairGrad
from parity import DEVICE

IMPLS = ["eager", *(["triton"] if TRITON_INSTALLED else [])]


def weights(d_in=16, d_sae=96):
    rows = torch.randn(d_sae, d_in, device=DEVICE)
    b_enc, b_dec = torch.zeros(d_sae, device=DEVICE), torch.randn(d_in, device=DEVICE)
    return [t.requires_grad_() for t in (rows.clone().t(), b_enc, rows, b_dec)]


def pairs_of_a_step(x, impl, copies):
    """The loss, and what its backward leaves for W_enc, W_dec and b_dec."""
    W_enc, b_enc, W_dec, b_dec = weights()
    encoder, decoder = collect_row_grads(W_enc), collect_row_grads(W_dec)
    half = [W_enc.detach().to(copies), W_dec.detach().to(copies)] if copies else [None, None]
    code = topk_encode(x, W_enc, b_enc, 4, W_compute=half[0], impl=impl)
    loss = mse_l1_loss(x, code, W_dec, b_dec, W_compute=half[1], impl=impl)
    loss.mse.backward()
    (enc,), (dec,) = encoder, decoder
    assert isinstance(enc, PairGrad) and isinstance(dec, PairGrad) and b_dec.grad is not None
    return loss, enc, dec, b_dec.grad


@pytest.mark.parametrize("copies", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_decoders_gradient_reads_the_error_in_the_copys_dtype(impl, copies):
    x = torch.randn(12, 16, device=DEVICE)
    loss, _, decoder, d_b_dec = pairs_of_a_step(x, impl, copies)
    assert loss.err.dtype == torch.float32
    expected = loss.err if copies is None else loss.err.to(copies)
    assert decoder.operand.dtype == expected.dtype and torch.equal(decoder.operand, expected)
    assert decoder.coef.dtype == torch.float32
    assert torch.allclose(d_b_dec, 2 * loss.err.mean(0), rtol=1e-6)


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32 product", "half product"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_encoders_gradient_reads_the_rows_of_its_product(monkeypatch, impl, rounded):
    devices = () if rounded else (DEVICE,)
    monkeypatch.setattr("fastsae_kernels._encoder_pairs.FP32_PRODUCT_DEVICES", devices)
    x = torch.randn(12, 16, device=DEVICE).bfloat16()
    _, encoder, _, _ = pairs_of_a_step(x, impl, torch.bfloat16)
    assert torch.equal(encoder.operand, x if rounded else x.float())
    assert encoder.operand.dtype == (torch.bfloat16 if rounded else torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_copy_rows_in_fp32_stay_as_they_are(impl):
    x = torch.randn(12, 16, device=DEVICE)
    _, encoder, _, _ = pairs_of_a_step(x, impl, None)
    assert encoder.operand.dtype == torch.float32 and torch.equal(encoder.operand, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_and_their_shift_have_the_gradient_of_the_copy(impl):
    x = torch.randn(12, 16, device=DEVICE, requires_grad=True)
    b_pre = torch.zeros(16, device=DEVICE)
    W_enc, b_enc, _, _ = weights()
    # Far from the master: what is read shows.
    copy = (W_enc.detach().t() + 1).bfloat16().t()
    encode = lambda **options: topk_encode(
        x, W_enc, b_enc, 4, b_pre=b_pre.requires_grad_(), impl=impl, **options
    )
    for options, weight in (({}, W_enc), ({"W_compute": copy}, copy)):
        code = encode(**options)
        found = torch.autograd.grad(code.acts.sum(), [b_pre, b_enc, x])
        picked = weight.detach().double().t()[code.indices.long()].sum(1)
        assert torch.allclose(found[2].double(), picked, rtol=1e-5, atol=1e-4)
        expected = -(weight.detach().double() @ found[1].double())
        assert found[0].dtype == torch.float32
        assert torch.allclose(found[0].double(), expected, rtol=1e-5, atol=1e-4)
