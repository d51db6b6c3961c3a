"""Row Adam as the optimizer of an SAE: `torch.optim.Adam`'s numbers, without a dense gradient."""

import pytest
import torch

from fastsae import OptimizerConfig, TopKConfig, TopKSAE
from fastsae.training.memory_order import restore_memory_order
from fastsae.training.optimizer import RowAdam, build_optimizer


def trained(kind, steps=4, clip=None, k=4, d_in=12, d_sae=600):
    torch.manual_seed(1)
    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=k))
    optimizer = build_optimizer(sae, OptimizerConfig(kind=kind), lr=1e-2)
    norms = []
    for _ in range(steps):
        x = torch.randn(64, d_in) + 1
        dead = torch.arange(d_sae) % 5 == 0
        optimizer.zero_grad()
        sae.loss(x, dead).total.backward()
        norms.append(optimizer.gradient_norm())
        if clip is not None:
            optimizer.scale_gradient((clip / norms[-1]).clamp_max(1.0))
        optimizer.step()
    return sae, optimizer, torch.stack(norms)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_same_numbers_as_plain_adam(clip):
    rows, _, row_norms = trained("row_adam", clip=clip)
    plain, _, plain_norms = trained("adam", clip=clip)
    assert torch.allclose(row_norms, plain_norms, rtol=1e-5)
    for (name, a), b in zip(rows.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), name


def test_weights_have_no_dense_gradient():
    sae, _, _ = trained("row_adam", steps=1)
    assert sae.W_enc.grad is None and sae.W_dec.grad is None and sae.b_enc.grad is not None


def test_two_runs_give_the_same_bits():
    first, second = (trained("row_adam")[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_from_outside_the_ops_is_refused():
    sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    optimizer = RowAdam(sae.parameters(), [sae.W_enc, sae.W_dec], lr=1e-3)
    sae.W_dec.square().sum().backward()
    with pytest.raises(RuntimeError, match="grad must be None under RowAdam"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["row_adam", "adam"])
def test_moments_in_another_memory_order_are_refused_and_can_be_restored(kind):
    sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    optimizer = build_optimizer(sae, OptimizerConfig(kind=kind), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sae.loss(torch.randn(16, 4)).total.backward()
        optimizer.step()
    moment = optimizer.state[sae.W_enc]["exp_avg"]
    assert moment.stride() == sae.W_enc.stride() == (1, 4)
    optimizer.state[sae.W_enc]["exp_avg"] = moment.contiguous()
    with pytest.raises(RuntimeError, match="exp_avg must have its parameter's strides"):
        optimizer.step()
    restored = restore_memory_order(sae.W_enc, moment.contiguous())
    assert torch.equal(restored, moment) and restored.stride() == (1, 4)
    optimizer.state[sae.W_enc]["exp_avg"] = restored
    optimizer.step()


def test_released_weights_have_ordinary_gradients_again():
    sae, optimizer, _ = trained("row_adam", steps=1)
    optimizer.release()
    sae.loss(torch.randn(64, 12)).total.backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None


def test_a_row_major_encoder_is_refused():
    sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    row_major = {name: t.contiguous() for name, t in sae.state_dict().items()}
    sae.load_state_dict(row_major, assign=True)
    optimizer = RowAdam(sae.parameters(), [sae.W_enc, sae.W_dec], lr=1e-3)
    sae.loss(torch.randn(16, 4)).total.backward()
    with pytest.raises((IndexError, ValueError), match="weight|index"):
        optimizer.step()
