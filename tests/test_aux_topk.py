from typing import Any

import pytest
import torch

from fastsae_kernels import Impl, aux_topk, workspace
from fastsae_kernels.auxk import eager
from parity import DEVICE, SHAPES, Shape, all_in, check_parity, lattice, weights

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


KERNEL_SHAPES = [Shape(5, 8, 97, 1), Shape(2, 6, 150, 1), Shape(3, 7, 257, 1)]
"""Of which two in three latents are dead: 16 for each of the D / 2 that are kept."""


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernels_match_reference(shape, dtype, scaled, monkeypatch):
    kernel = pytest.importorskip("fastsae_kernels.topk.kernel")
    monkeypatch.setattr(kernel, "fits", lambda d_sae, k: d_sae >= 16 * k)
    monkeypatch.setitem(eager.DENSE_BELOW, Impl.TRITON, 0)
    dead = torch.arange(shape.F, device=DEVICE) % 3 != 1
    inputs = weights(shape) | {"err": lattice(shape.B, shape.D)}
    if scaled:
        inputs["scale"] = torch.full((shape.F,), 0.5, dtype=torch.float64, device=DEVICE)
    check_parity(losses_for(dead), inputs, all_in(dtype), Impl.TRITON)


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


BAD: dict[str, Any] = {
    "dead_float": ({"dead": torch.zeros(9)}, "dead must be bool, got torch.float32"),
    "dead": ({"dead": torch.zeros(8).bool()}, r"dead must have shape \[F\] = \[9\], got \[8\]"),
    "err": ({"err": torch.ones(1, 3)}, r"err must have shape .* = \[2, 3\], got \[1, 3\]"),
    "err_int": ({"err": torch.ones(2, 3).int()}, "err must be a floating dtype"),
    "b_enc_int": ({"b_enc": torch.ones(9).int()}, "b_enc must be a floating dtype"),
    "W_dec": ({"W_dec": torch.ones(8, 3)}, r"W_dec must have shape \[F, D\] = \[9, \*\], got"),
    "W_dec_int": ({"W_dec": torch.ones(9, 3).int()}, "W_dec must be a floating dtype"),
    "b_pre": ({"b_pre": torch.ones(4)}, r"b_pre must have shape \[D\] = \[3\], got \[4\]"),
    "b_pre_int": ({"b_pre": torch.ones(3).int()}, "b_pre must be a floating dtype"),
    "b_pre_device": ({"b_pre": torch.ones(3, device="meta")}, "share a device, .* b_pre on meta"),
    "scale": ({"scale": torch.ones(8)}, r"scale must have shape \[F\] = \[9\], got \[8\]"),
    "scale_int": ({"scale": torch.ones(9).int()}, "scale must be a floating dtype"),
    "scale_device": ({"scale": torch.ones(9, device="meta")}, "share a device, .* scale on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(name):
    change, message = BAD[name]
    good: dict[str, Any] = {
        "x": torch.ones(2, 3),
        "err": torch.ones(2, 3),
        "dead": torch.ones(9).bool(),
    }
    good |= {"W_enc": torch.ones(3, 9), "b_enc": torch.ones(9), "W_dec": torch.ones(9, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        aux_topk(**(good | change))
