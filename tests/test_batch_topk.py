from typing import Any

import pytest
import torch

from encodes import Largest, encoder, fp32, from_sae_lens, mixed, parts_of
from fastsae_kernels import Impl, batch_topk_encode, collect_row_grads, mse_l1_loss, workspace
from fastsae_kernels._dispatch import TRITON_INSTALLED
from fastsae_kernels.batch_topk import eager
from parity import (
    CASES,
    DEVICE,
    EVERY_IMPL,
    SHAPES,
    Shape,
    all_in,
    check_parity,
    relative_error,
    weights,
)

EAGER = Impl.EAGER.value
COMPILED = [impl.value for impl in EVERY_IMPL if impl is not Impl.REFERENCE]
"""Of 256 latents and up the kernels take what their tests ask for without `eager`."""


@pytest.fixture
def kernels_take_every_shape(monkeypatch):
    if TRITON_INSTALLED:
        from fastsae_kernels.batch_topk import kernel

        monkeypatch.setattr(
            kernel, "fits", lambda n, d_sae, n_kept: 0 < n_kept <= n * (d_sae // 16)
        )


def distinct(shape):
    """Inputs of which no two scores of the whole batch are equal, all of them exact in fp32."""
    inputs = weights(shape)
    order = torch.randperm(shape.F, device=inputs["x"].device).double()
    # Below the lattice's 1/64: the bias tells latents apart, one column the rows.
    inputs["b_enc"] = order * shape.B * 2.0**-20
    inputs["x"][:, -1] = torch.arange(shape.B, device=order.device).double() / 32
    inputs["W_enc"][-1] = 2.0**-15
    return inputs


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("impl, dtype, shape", CASES)
@pytest.mark.usefixtures("kernels_take_every_shape")
def test_encode_and_gradients_match_reference(shape, dtype, impl, scaled):
    inputs = distinct(shape)
    if scaled:
        inputs["scale"] = 2.0 ** torch.randint(-1, 2, (shape.F,), device=inputs["x"].device)

    def losses(i, impl):
        code = batch_topk_encode(
            *encoder(i), k=shape.K - 0.5, b_pre=i["b_dec"], scale=i.get("scale"), impl=impl
        )

        return parts_of(code) | {"loss": mixed(code.acts)}

    # In bf16 the biases that tell scores apart would be equal.
    wide = torch.promote_types(dtype, torch.float32)
    check_parity(losses, inputs, all_in(dtype) | {"scale": wide, "b_enc": wide}, impl)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("k", [0.3, 1, 3.4])
def test_the_kernels_are_exact_on_hard_batches(k):
    pytest.importorskip("triton")
    rows = {kind: adversarial(kind, 300).float().to(DEVICE) for kind in KINDS}
    finite = [row for row in rows.values() if row.isfinite().all()]
    check_kernels(torch.eye(len(finite), device=DEVICE), torch.stack(finite), k)
    for row in finite:
        check_kernels(torch.eye(4, device=DEVICE), row.view(4, -1), k)
    factors = torch.tensor([[1.0], [0.5], [-1.0], [2.0]], device=DEVICE)
    for kind in ("infinite", "minus_infinite"):
        check_kernels(factors, rows[kind][None], k)


def check_kernels(x, weight, k):
    """The largest of the batch, each where it is said to be; the products are exact."""
    d_sae, n_kept = weight.shape[1], int(k * len(x))
    code = batch_topk_encode(x, weight, torch.zeros(d_sae, device=DEVICE), k, impl="triton")
    exact = (x[:, :, None] * weight).sum(1).relu()
    assert code.acts.shape == (n_kept,)
    assert torch.equal(code.acts.sort(descending=True).values, exact.view(-1).topk(n_kept).values)
    entry_rows = code.rows().long()
    assert torch.equal(exact[entry_rows, code.indices.long()], code.acts)
    places = entry_rows * d_sae + code.indices
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("k", [1, 7, 3.3, 0.3, 50, 1e-3])
def test_code_and_gradients_are_those_of_sae_lens(k):
    theirs = from_sae_lens("saes/batchtopk_sae.py", "BatchTopK")["BatchTopK"](k)
    shape = Shape(20, 24, 50, 1)
    inputs = {name: torch.randn_like(v.float()) for name, v in weights(shape).items()}
    leaves = {name: v.requires_grad_() for name, v in inputs.items() if name != "x"}
    x, W_enc, b_enc, W_dec, b_dec = (
        inputs[name] for name in ("x", "W_enc", "b_enc", "W_dec", "b_dec")
    )
    acts = theirs((x - b_dec) @ W_enc + b_enc)
    expected = (acts @ W_dec + b_dec - x).square().sum(-1).mean()
    code = batch_topk_encode(x, W_enc, b_enc, k, b_pre=b_dec)
    assert code.acts.shape == (int(k * 20),)
    assert torch.allclose(code.to_dense(50), acts, atol=1e-5)
    assert code.groups is not None
    assert torch.equal(code.groups.counts().long(), (acts != 0).sum(0))
    got = mse_l1_loss(x, code, W_dec, b_dec).mse
    assert relative_error(got.detach(), expected.detach()) < 1e-5
    have = torch.autograd.grad(got, list(leaves.values()))
    want = torch.autograd.grad(expected, list(leaves.values()))
    for name, a, b in zip(leaves, have, want, strict=True):
        assert relative_error(a, b) < 1e-4, name


def adversarial(kind, n):
    ramp = torch.arange(n, dtype=torch.float64)
    return {
        "increasing": ramp,
        "decreasing": n - ramp,
        "all_equal": torch.ones(n).double(),
        "all_zero": torch.zeros(n).double(),
        "all_negative": -1 - ramp,
        "few_positive": torch.where(ramp % 401 == 5, ramp, -ramp),
        "ties": torch.randint(0, 4, (n,)).double(),
        "infinite": torch.where(ramp % 97 == 0, torch.inf, torch.randn(n).double()),
        "minus_infinite": torch.where(ramp % 2 == 0, -torch.inf, torch.randn(n).double()),
        "random": torch.randn(n).double(),
        "late": torch.where(ramp >= n - 40, ramp, torch.rand(n).double()),
        "tiny": ramp * 5e-324,
    }[kind]


KINDS = [
    "increasing",
    "decreasing",
    "all_equal",
    "all_zero",
    "all_negative",
    "few_positive",
    "ties",
    "infinite",
    "minus_infinite",
    "random",
    "late",
    "tiny",
]


def largest_of(scores, n_kept, pieces):
    best = eager._Largest(n_kept, scores)
    for first in range(0, len(scores), pieces):
        best.add(scores[first : first + pieces], first)
    return best.finish()


def check_exact(scores, n_kept, pieces):
    """The multiset, and the lowest places first among equals."""
    values, places = largest_of(scores, n_kept, pieces)
    expected = scores.relu().argsort(descending=True, stable=True)[:n_kept].sort().values
    assert torch.equal(places, expected)
    assert torch.equal(values, scores.relu()[expected])


@pytest.mark.parametrize("n_kept", [1, 40, 700, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_exact_on_adversarial_scores(kind, n_kept):
    check_exact(adversarial(kind, 1500), n_kept, 64)
    check_exact(adversarial(kind, 1500).float(), n_kept, 331)


def test_random_search_finds_no_mismatch():
    generator = torch.Generator().manual_seed(7)
    for trial in range(500):
        n = int(torch.randint(1, 600, (), generator=generator))
        n_kept, pieces = (torch.randint(4, n + 4, (2,), generator=generator) // 4).tolist()
        scores = torch.randn(n, generator=generator)
        if trial % 3 == 0:
            scores = (scores * 2).round()
        check_exact(scores, n_kept, pieces)


@pytest.mark.parametrize("n_nan", [1, 30, 200])
def test_nan_is_the_largest_value(n_nan):
    scores = torch.linspace(-1, 1, 400)
    scores[:3] = torch.inf
    where = torch.randperm(400)[:n_nan]
    scores[where] = -torch.nan
    values, places = largest_of(scores, 50, 64)
    assert int(values.isnan().sum()) == min(n_nan, 50)
    kept, nans = set(places.tolist()), set(where.tolist())
    assert kept <= nans or nans <= kept
    assert (values[~values.isnan()] >= 0).all() and len(kept) == 50


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("k", [5, 170])
@pytest.mark.parametrize("impl", EVERY_IMPL)
def test_nan_row_comes_out_as_nan(impl, k):
    inputs = fp32(Shape(4, 8, 640, 5))
    inputs["x"][2, 3] = torch.nan
    code = batch_topk_encode(*encoder(inputs), k=k, impl=impl)
    counts = code.row_offsets.diff().tolist()
    assert counts[2] == min(640, 4 * k) and sum(counts) == 4 * k
    nan = code.acts.isnan()
    assert torch.equal(nan, code.rows() == 2)
    found = mse_l1_loss(inputs["x"], code, inputs["W_dec"], inputs["b_dec"], impl=impl)
    assert found.mse.isnan()


@pytest.mark.parametrize("kind", ["random", "increasing", "all_equal", "all_zero", "few_positive"])
def test_small_workspace_gives_the_same_code(kind):
    """Rows of the identity make the weights the scores."""
    scores = adversarial(kind, 70 * 9000).float().view(70, 9000)
    arguments = torch.eye(70), scores, torch.zeros(9000), 300, None
    whole = eager.select_batch_topk(*arguments)
    with workspace(1 << 20), Largest() as largest:
        parts = eager.select_batch_topk(*arguments)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    expected = scores.relu().flatten().topk(300).values
    assert torch.equal(whole[2].sort(descending=True).values, expected)
    assert largest.n <= 1 << 17, "no tensor of half the batch's scores"


def test_fewer_than_k_positives_are_filled_with_zeros_at_distinct_pairs():
    x = torch.eye(3)
    W_enc = torch.zeros(3, 5)
    W_enc[0, 2], W_enc[2, 4], W_enc[0, 0] = 1.0, 3.0, 2.0
    W_enc.requires_grad_()
    code = batch_topk_encode(x, W_enc, torch.zeros(5), 2)
    assert code.row_offsets.tolist() == [0, 5, 5, 6]
    assert code.indices.tolist() == [0, 1, 2, 3, 4, 4]
    assert code.acts.tolist() == [2, 0, 1, 0, 0, 3]
    assert code.groups is not None and code.groups.counts().tolist() == [1, 0, 1, 0, 1]
    code.acts.sum().backward()
    assert W_enc.grad is not None
    assert W_enc.grad.nonzero().tolist() == [[0, 0], [0, 2], [2, 4]]


def test_a_batch_may_keep_nothing_or_everything():
    inputs = fp32(Shape(3, 4, 6, 1))
    W_enc = inputs["W_enc"].requires_grad_()
    nothing = batch_topk_encode(*encoder(inputs), k=0.3)
    assert nothing.row_offsets.tolist() == [0] * 4 and nothing.acts.shape == (0,)
    nothing.acts.sum().backward()
    assert W_enc.grad is not None and not W_enc.grad.any()
    everything = batch_topk_encode(*encoder(inputs), k=6)
    assert everything.indices.tolist() == [0, 1, 2, 3, 4, 5] * 3
    empty = batch_topk_encode(inputs["x"][:0], W_enc, inputs["b_enc"], 2)
    assert empty.row_offsets.tolist() == [0]


def test_half_precision_product_is_close_to_the_reference(monkeypatch):
    """What a GPU does with bf16 rows, run on the CPU: bf16 operands and product, the rest fp32."""
    from fastsae_kernels import _encoder_pairs

    monkeypatch.setattr(_encoder_pairs, "FP32_PRODUCT_DEVICES", ())
    inputs = fp32(SHAPES[0])
    arguments = inputs["x"].bfloat16(), inputs["W_enc"], inputs["b_enc"], 8
    exact = batch_topk_encode(*arguments, impl="reference").acts.sort().values
    acts = batch_topk_encode(*arguments, impl=EAGER).acts
    assert acts.dtype == torch.float32
    assert relative_error(acts.sort().values, exact) < 2**-7


def test_row_optimizer_gets_the_pairs():
    inputs = fp32(SHAPES[0])
    leaves = [inputs["W_enc"].clone().requires_grad_() for _ in range(2)]
    sink = collect_row_grads(leaves[1])
    for W_enc in leaves:
        mixed(batch_topk_encode(inputs["x"], W_enc, inputs["b_enc"], 4.5).acts).backward()
    assert leaves[1].grad is None and len(sink) == 1 and leaves[0].grad is not None
    assert torch.allclose(sink[0].block(0, 256), leaves[0].grad.t(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("impl", COMPILED)
def test_compiles_without_graph_breaks(impl):
    inputs = {k: v.requires_grad_() for k, v in fp32(Shape(8, 12, 256, 1)).items()}

    def step(i):
        code = batch_topk_encode(*encoder(i), k=3.5, b_pre=i["b_dec"], impl=impl)
        found = mse_l1_loss(i["x"], code, i["W_dec"], i["b_dec"], impl=impl)
        return found.mse + 0.1 * found.l1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(inputs), list(inputs.values())) for f in (step, compiled)]
    for plain, traced in zip(*grads, strict=True):
        assert torch.equal(plain, traced)


@pytest.mark.parametrize("impl", COMPILED)
def test_op_is_registered_as_it_behaves(impl):
    inputs = fp32(Shape(5, 6, 256, 1))
    for scale in (None, torch.full((256,), 2.0, device=DEVICE)):
        arguments = (*encoder(inputs), 7, scale, impl)
        torch.library.opcheck(torch.ops.fastsae.select_batch_topk.default, arguments)


GOOD: dict[str, Any] = {
    "x": torch.ones(2, 3),
    "W_enc": torch.ones(3, 9),
    "b_enc": torch.ones(9),
    "k": 2,
}
BAD: dict[str, Any] = {
    "x": ({"x": torch.ones(2, 4)}, r"x must have shape \[\.\.\., D\] with D = 3, got \[2, 4\]"),
    "x_ndim": ({"x": torch.ones(1, 2, 3)}, r"x must have shape \[B, D\]"),
    "W_enc": ({"W_enc": torch.ones(3)}, r"W_enc must have shape \[D, F\]"),
    "b_enc": ({"b_enc": torch.ones(8)}, r"b_enc must have shape \[F\] = \[9\], got \[8\]"),
    "b_pre": ({"b_pre": torch.ones(4)}, r"b_pre must have shape \[D\] = \[3\], got \[4\]"),
    "scale": ({"scale": torch.ones(8)}, r"scale must have shape \[F\]"),
    "copy": ({"W_compute": torch.ones(9, 3)}, r"W_compute must have shape W_enc's = \[3, 9\]"),
    "k_small": ({"k": 0}, r"k must be in \(0, F\] with F = 9, got 0"),
    "k_large": ({"k": 9.5}, r"k must be in \(0, F\] with F = 9, got 9.5"),
    "k_nan": ({"k": torch.nan}, r"k must be in \(0, F\] with F = 9, got nan"),
    "impl": ({"impl": "fast"}, r"impl must be one of \['auto', 'triton', 'eager', 'reference'\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        batch_topk_encode(**(GOOD | change))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be a floating dtype"):
        batch_topk_encode(**{**GOOD, "x": torch.ones(2, 3, dtype=torch.int64)})
