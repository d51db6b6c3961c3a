import pytest
import torch

from fastsae_kernels import Impl, aux_topk, workspace
from fastsae_kernels.auxk import eager
from parity import CASES, DEVICE, SHAPES, Shape, all_in, check_parity, lattice, weights

pytestmark = pytest.mark.usefixtures("made_where_kernels_run")


def losses_for(dead):
    def losses(i, impl):
        loss = aux_topk(
            i["x"],
            i["err"],
            dead,
            i["W_enc"],
            i["b_enc"],
            i["W_dec"],
            b_pre=i["b_dec"],
            scale=None if "scale" not in i else i["scale"].detach(),
            impl=impl,
        )
        return {"aux": loss}

    return losses


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_match_reference(shape, fraction, scaled, dense, monkeypatch):
    monkeypatch.setitem(eager.DENSE_BELOW, Impl.EAGER, 10**9 if dense else 0)
    dead = torch.rand(shape.F) < fraction
    dead[0] = True
    inputs = weights(shape) | {"err": lattice(shape.B, shape.D)}
    if scaled:
        inputs["scale"] = torch.full((shape.F,), 0.5, dtype=torch.float64)
    check_parity(losses_for(dead), inputs, all_in(torch.float32))


@pytest.mark.parametrize("impl, dtype, shape", [c for c in CASES if c.values[0] is Impl.TRITON])
def test_kernels_match_reference(shape, dtype, impl, monkeypatch):
    monkeypatch.setitem(eager.DENSE_BELOW, Impl.TRITON, 0)
    dead = torch.arange(shape.F, device=DEVICE) % 3 != 1
    inputs = weights(shape) | {"err": lattice(shape.B, shape.D)}
    check_parity(losses_for(dead), inputs, all_in(dtype), impl)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_a_dead_latent_without_a_decoder_row_is_no_nan(impl, monkeypatch):
    monkeypatch.setitem(eager.DENSE_BELOW, Impl.EAGER, 0)
    inputs = weights(Shape(4, 6, 20, 2)) | {"err": lattice(4, 6)}
    inputs["scale"] = torch.zeros(20, dtype=torch.float64, device=DEVICE)
    dead = torch.ones(20, dtype=torch.bool, device=DEVICE)
    assert losses_for(dead)(inputs, impl)["aux"].isfinite()


def test_gradient_reaches_the_encoder():
    inputs = weights(Shape(8, 12, 60, 4))
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    leaves["err"] = lattice(8, 12)
    losses_for(torch.arange(60) % 2 == 0)(leaves, "eager")["aux"].backward()
    grads = {name: leaves[name].grad for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, grad in grads.items():
        assert grad is not None and grad.abs().max() > 0, name
    alive = slice(1, None, 2)
    assert grads["W_enc"] is not None and grads["W_enc"][:, alive].abs().max() == 0


def test_small_workspace_changes_nothing_but_rounding():
    inputs = {k: v.float() for k, v in weights(Shape(300, 40, 2000, 4)).items()}
    inputs["err"] = lattice(300, 40).float()
    dead = torch.rand(2000) < 0.15
    whole = losses_for(dead)(inputs, "eager")["aux"]
    with workspace(1 << 20):
        parts = losses_for(dead)(inputs, "eager")["aux"]
    assert torch.allclose(whole, parts, rtol=1e-5)


def test_without_dead_latents_the_loss_is_zero():
    inputs = weights(Shape(4, 6, 20, 2)) | {"err": lattice(4, 6)}
    dead = torch.zeros(20, dtype=torch.bool)
    for impl in ("eager", "reference"):
        assert losses_for(dead)(inputs, impl)["aux"] == 0


def test_dead_that_is_not_bool_is_refused():
    inputs = weights(Shape(4, 6, 20, 2)) | {"err": lattice(4, 6)}
    with pytest.raises(TypeError, match="dead must be bool, got torch.float32"):
        losses_for(torch.zeros(20))(inputs, "eager")
    with pytest.raises(ValueError, match=r"dead must have shape \[F\] = \[20\], got \[19\]"):
        losses_for(torch.zeros(19, dtype=torch.bool))(inputs, "eager")
