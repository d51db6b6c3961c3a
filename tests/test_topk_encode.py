from typing import Any

import pytest
import torch

from fastsae_kernels import (
    Impl,
    SparseCode,
    _dispatch,
    _encoder_pairs,
    release_scratch,
    topk_encode,
    workspace,
)
from fastsae_kernels._dispatch import TRITON_INSTALLED
from fastsae_kernels.topk import eager
from parity import (
    CASES,
    DEVICE,
    EVERY_IMPL,
    SHAPES,
    Shape,
    all_in,
    check_parity,
    lattice,
    relative_error,
    weights,
)


@pytest.fixture(autouse=True)
def kernels_take_every_shape(monkeypatch):
    if TRITON_INSTALLED:
        from fastsae_kernels.topk import kernel

        monkeypatch.setattr(kernel, "fits", lambda d_sae, k: d_sae // kernel.GROUP_SIZES[-1] >= k)


def encode(inputs, impl, k):
    code = topk_encode(
        inputs["x"],
        inputs["W_enc"],
        inputs["b_enc"],
        k,
        b_pre=inputs["b_dec"],
        scale=inputs.get("scale"),
        impl=impl,
    )
    mix = torch.linspace(0.5, 1.5, code.acts.numel(), dtype=torch.float64, device=DEVICE).view_as(
        code.acts
    )
    return {"acts": code.acts, "indices": code.indices, "loss": (code.acts * mix).sum()}


@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_matches_reference(shape, dtype, impl):
    check_parity(lambda i, impl: encode(i, impl, shape.K), weights(shape), all_in(dtype), impl)


@pytest.mark.parametrize("impl", EVERY_IMPL)
@pytest.mark.parametrize("shape", [Shape(5, 33, 97, 5), Shape(4, 16, 128, 8)], ids=str)
def test_row_major_weights_match_reference(shape, impl):
    inputs = weights(shape)
    inputs["W_enc"] = inputs["W_enc"].contiguous()
    check_parity(lambda i, impl: encode(i, impl, shape.K), inputs, all_in(torch.float32), impl)


@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_scale_and_its_gradient_match_reference(shape, dtype, impl):
    inputs = weights(shape) | {
        "scale": 2.0 ** torch.randint(-1, 2, (shape.F,), device=DEVICE).double()
    }
    inputs["b_enc"] = torch.zeros(shape.F, dtype=torch.float64, device=DEVICE)
    # Powers of two times odd multiples of 2^-18: still exact, still distinct.
    inputs["b_enc"] += torch.randperm(shape.F, device=DEVICE).double() * 2.0**-15 + 2.0**-17
    check_parity(lambda i, impl: encode(i, impl, shape.K), inputs, all_in(dtype), impl)


def values_of(scores, k):
    return scores.relu().topk(k, dim=-1).values


def adversarial(kind, B, F):
    ramp = torch.arange(F, dtype=torch.float64).repeat(B, 1)
    return {
        "increasing": ramp,
        "decreasing": F - ramp,
        "clustered": torch.where((ramp // 32 == 3), ramp, ramp / F),
        "all_equal": torch.ones(B, F, dtype=torch.float64),
        "all_zero": torch.zeros(B, F, dtype=torch.float64),
        "all_negative": -1 - ramp,
        "few_positive": torch.where(ramp % 401 == 5, ramp, -ramp),
        "ties": torch.randint(0, 4, (B, F)).double(),
        "infinite": torch.where(ramp % 97 == 0, torch.inf, torch.randn(B, F).double()),
        "minus_infinite": torch.where(ramp % 2 == 0, -torch.inf, torch.randn(B, F).double()),
        "random": torch.randn(B, F, dtype=torch.float64),
        "late": torch.where(ramp >= F - 40, ramp, torch.rand(B, F).double()),
    }[kind]


KINDS = [
    "increasing",
    "decreasing",
    "clustered",
    "all_equal",
    "all_zero",
    "all_negative",
    "few_positive",
    "ties",
    "infinite",
    "minus_infinite",
    "random",
    "late",
]


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_exact_on_adversarial_scores(kind, k):
    scores = adversarial(kind, 6, 1500)
    best = eager._Best(scores.new_empty(len(scores), k), 0.0)
    for first in range(0, 1500, 320):
        best.merge(scores[:, first : first + 320].contiguous(), first)
    acts, indices = best.finish(1500)
    assert torch.equal(acts, values_of(scores, k))
    assert torch.equal(scores.relu().gather(1, indices.long()), acts)
    assert all(len(set(row)) == k for row in indices.tolist())
    check_order(acts, indices)


def check_order(acts, indices):
    tied = acts[:, 1:] == acts[:, :-1]
    assert (acts[:, 1:] <= acts[:, :-1]).all()
    assert (indices[:, 1:] > indices[:, :-1])[tied].all()


def test_random_search_finds_no_mismatch_of_the_multiset():
    generator = torch.Generator().manual_seed(7)
    for trial in range(400):
        B, F = (int(n) for n in torch.randint(1, 300, (2,), generator=generator))
        k = int(torch.randint(1, F + 1, (1,), generator=generator))
        scores = torch.randn(B, F, generator=generator)
        if trial % 3 == 0:
            scores = (scores * 2).round()
        width = int(torch.randint(1, 8, (1,), generator=generator)) * 32
        best = eager._Best(scores.new_empty(len(scores), k), 0.0)
        for first in range(0, F, width):
            best.merge(scores[:, first : first + width].contiguous(), first)
        acts, indices = best.finish(F)
        assert torch.equal(acts, values_of(scores, k)), (trial, B, F, k)
        assert torch.equal(scores.relu().gather(1, indices.long()), acts)
        check_order(acts, indices)


@pytest.mark.parametrize("signed", [False, True])
def test_small_workspace_gives_the_same_bits(signed):
    shape = Shape(70, 24, 9000, 12)
    inputs = {k: v.float() for k, v in weights(shape).items()}
    arguments = inputs["x"], inputs["W_enc"], inputs["b_enc"], 12, None, signed
    whole = eager.select_topk(*arguments)
    with workspace(1 << 20):
        parts = eager.select_topk(*arguments)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("impl", EVERY_IMPL)
def test_nan_comes_out_as_nan(impl):
    inputs = {k: v.float() for k, v in weights(Shape(4, 8, 640, 5)).items()}
    inputs["x"][2, 3] = torch.nan
    code = topk_encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], 5, impl=impl)
    assert code.acts[2].isnan().any()
    assert not code.acts[[0, 1, 3]].isnan().any()


def test_fewer_than_k_positives_are_padded_with_zeros_at_distinct_latents():
    x = torch.eye(3)
    W_enc = torch.zeros(3, 50)
    W_enc[0, 2], W_enc[0, 40], W_enc[1, 0] = 1.0, 3.0, 2.0
    code = topk_encode(x, W_enc, torch.zeros(50), 4, impl="eager")
    assert code.acts.tolist() == [[3, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert code.indices.tolist() == [[40, 2, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert code.to_dense(50)[0].nonzero().flatten().tolist() == [2, 40]


def test_leading_axes_and_memory_orders_do_not_matter():
    inputs = {k: v.float() for k, v in weights(Shape(24, 16, 300, 6)).items()}
    flat = topk_encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], 6)
    cube = topk_encode(inputs["x"].reshape(2, 3, 4, 16), inputs["W_enc"], inputs["b_enc"], 6)
    assert torch.equal(cube.acts.reshape(24, 6), flat.acts)
    strided = torch.stack([inputs["x"], inputs["x"]], dim=2)[..., 0]
    row_major = inputs["W_enc"].contiguous()
    other = topk_encode(strided, row_major, inputs["b_enc"], 6)
    assert torch.equal(other.indices, flat.indices)


def test_half_precision_product_is_close_to_the_reference(monkeypatch):
    """What a GPU does with bf16 rows, run on the CPU: bf16 operands and product, the rest fp32."""
    monkeypatch.setattr(_encoder_pairs, "FP32_PRODUCT_DEVICES", ())
    inputs = {k: v.float() for k, v in weights(SHAPES[0]).items()} | {
        "b_dec": torch.zeros(32, device=DEVICE)
    }
    exact = encode(inputs, Impl.REFERENCE, 8)["acts"]
    acts = encode(inputs | {"x": inputs["x"].bfloat16()}, Impl.EAGER, 8)["acts"]
    assert acts.dtype == torch.float32
    assert relative_error(acts, exact) < 2**-7


def test_encoding_in_inference_mode_does_not_stop_training():
    inputs = {k: v.float() for k, v in weights(SHAPES[0]).items()}
    release_scratch()
    with torch.inference_mode():
        topk_encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], 8)
    encode({k: v.requires_grad_() for k, v in inputs.items()}, Impl.EAGER, 8)["loss"].backward()


def test_groups_are_made_for_a_backward_only():
    inputs = {k: v.float() for k, v in weights(SHAPES[0]).items()}
    W_enc = inputs["W_enc"].requires_grad_()
    assert topk_encode(inputs["x"], W_enc, inputs["b_enc"], 8).groups is not None
    with torch.no_grad():
        assert topk_encode(inputs["x"], W_enc, inputs["b_enc"], 8).groups is None


def test_empty_batch_gives_an_empty_code():
    code = topk_encode(torch.zeros(0, 4), torch.zeros(4, 9), torch.zeros(9), 2)
    assert isinstance(code, SparseCode) and code.acts.shape == (0, 2)


GOOD: dict[str, Any] = {"x": lattice(2, 3), "W_enc": lattice(3, 9), "b_enc": lattice(9), "k": 2}
BAD = {
    "x": ({"x": lattice(2, 4)}, r"x must have shape \[\.\.\., D\] with D = 3, got \[2, 4\]"),
    "W_enc": ({"W_enc": lattice(3)}, r"W_enc must have shape \[D, F\]"),
    "b_enc": ({"b_enc": lattice(8)}, r"b_enc must have shape \[F\] = \[9\], got \[8\]"),
    "b_pre": ({"b_pre": lattice(4)}, r"b_pre must have shape \[D\] = \[3\], got \[4\]"),
    "scale": ({"scale": lattice(8)}, r"scale must have shape \[F\]"),
    "k_small": ({"k": 0}, r"k must be in \[1, F\] with F = 9, got 0"),
    "k_large": ({"k": 10}, r"k must be in \[1, F\] with F = 9, got 10"),
    "k_fraction": ({"k": 2.5}, "k must be an int, got 2.5"),
    "k_bool": ({"k": True}, "k must be an int, got True"),
    "x_int": ({"x": torch.ones(2, 3).int()}, "x must be a floating dtype"),
    "device": ({"x": torch.ones(2, 3, device="meta")}, "x and the others must share a device, got"),
    "impl": ({"impl": "fast"}, r"impl must be one of \['auto', 'triton', 'eager', 'reference'\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(name):
    change, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        topk_encode(**(GOOD | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")
def test_kernels_without_a_gpu_or_the_interpreter_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="impl='triton' needs tensors on a GPU, got cpu"):
        topk_encode(**GOOD, impl=Impl.TRITON)


def test_kernels_without_triton_are_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        topk_encode(**GOOD, impl=Impl.TRITON)


@pytest.mark.parametrize("name", ["x", "W_enc", "b_enc", "b_pre", "scale", "W_compute"])
def test_kernels_refuse_fp64(name):
    sizes = {"x": (2, 3), "W_enc": (3, 9), "b_enc": (9,), "b_pre": (3,), "scale": (9,)}
    sizes["W_compute"] = (3, 9)
    good: dict[str, Any] = {n: torch.ones(*size, device=DEVICE) for n, size in sizes.items()}
    with pytest.raises(TypeError, match="impl='triton' takes .*, got float64"):
        topk_encode(**(good | {name: good[name].double()}), k=2, impl=Impl.TRITON)
