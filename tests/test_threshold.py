from itertools import product

import pytest
import torch

from encodes import Largest, encoder, fp32, from_sae_lens, mixed, parts_of
from fastsae_kernels import (
    Impl,
    collect_row_grads,
    mse_l1_loss,
    relu_l1_loss,
    threshold_encode,
    workspace,
)
from fastsae_kernels._dispatch import TRITON_INSTALLED
from fastsae_kernels.threshold import eager, jumprelu_encode
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

BANDWIDTH = 0.5
EAGER = Impl.EAGER.value
COMPILED = [impl.value for impl in EVERY_IMPL if impl is not Impl.REFERENCE]

pytestmark = pytest.mark.usefixtures("made_where_kernels_run")


@pytest.fixture
def always_sparse(monkeypatch):
    """Half of these small dictionaries is active: without this the kernels would go dense."""
    if TRITON_INSTALLED:
        from fastsae_kernels.threshold import kernel

        monkeypatch.setattr(kernel, "DENSE_ABOVE", 1.0)


@pytest.mark.parametrize("kind", ["relu", "one", "per_latent", "scaled"])
@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_encode_and_gradients_match_reference(shape, dtype, impl, kind, always_sparse):
    inputs = weights(shape)
    if kind == "scaled":
        inputs["scale"] = 2.0 ** torch.randint(-1, 2, (shape.F,), device=inputs["x"].device)
    per_latent = lattice(shape.F).abs()
    threshold = {"relu": 0.0, "one": 0.75, "scaled": torch.tensor(0.5)}.get(kind, per_latent)

    def losses(i, impl):
        code = threshold_encode(
            *encoder(i), threshold=threshold, b_pre=i["b_dec"], scale=i.get("scale"), impl=impl
        )
        return parts_of(code) | {"loss": mixed(code.acts)}

    wide = torch.promote_types(dtype, torch.float32)
    check_parity(losses, inputs, all_in(dtype) | {"scale": wide}, impl)


def test_nothing_but_what_is_above_is_kept():
    code = threshold_encode(
        torch.eye(2), torch.tensor([[1.0, 0.0, 0.5], [-1.0, 2.0, 0.6]]), torch.zeros(3),
        threshold=torch.tensor([0.5, 0.0, 0.5]),
    )  # fmt: skip
    assert code.row_offsets.tolist() == [0, 1, 3]
    assert code.indices.tolist() == [0, 1, 2]
    assert code.acts.tolist() == [1.0, 2.0, pytest.approx(0.6)]


def jumprelu(inputs, impl, threshold):
    code, l0 = jumprelu_encode(
        *encoder(inputs), threshold=threshold, bandwidth=BANDWIDTH, b_pre=inputs["b_dec"], impl=impl
    )
    found = mse_l1_loss(inputs["x"], code, inputs["W_dec"], inputs["b_dec"], impl=impl)
    return code, l0, found


@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_each_jumprelu_loss_matches_reference(shape, dtype, impl, always_sparse):
    inputs = weights(shape) | {"threshold": lattice(shape.F).abs()}

    def losses(i, impl):
        code, l0, found = jumprelu(i, impl, i["threshold"])
        return parts_of(code) | {
            "row_l0": l0,
            "acts": mixed(code.acts),
            "l0": mixed(l0),
            "mse": found.mse,
            "both": found.mse + 0.3 * l0.mean(),
        }

    check_parity(losses, inputs, all_in(dtype) | {"threshold": torch.float32}, impl)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_the_kernels_agree_on_either_side_of_the_dense_switch(share, monkeypatch):
    kernel = pytest.importorskip("fastsae_kernels.threshold.kernel")
    monkeypatch.setattr(kernel, "DENSE_ABOVE", share)
    inputs = fp32(Shape(9, 20, 700, 1))
    for threshold in (0.0, 1.5, 4.0):
        code = threshold_encode(*encoder(inputs), threshold=threshold, impl=Impl.TRITON)
        truth = threshold_encode(*encoder(inputs), threshold=threshold, impl=Impl.REFERENCE)
        for got, want in zip(code[:3], truth[:3], strict=True):
            assert torch.equal(got, want)


def test_listed_groups_by_slices_give_the_same_bits(always_sparse, monkeypatch):
    kernel = pytest.importorskip("fastsae_kernels.threshold.kernel")
    inputs = {k: v.float() for k, v in weights(Shape(4, 8, 192, 1)).items()}
    encode = lambda: threshold_encode(*encoder(inputs), threshold=0.5, impl="triton")
    whole, sizes, run = encode(), [], kernel._add_listed
    monkeypatch.setattr(kernel, "BYTES_A_MEMBER", 1 << 20)
    monkeypatch.setattr(
        kernel, "_add_listed", lambda *args: (sizes.append(args[6].shape[1]), run(*args))
    )
    sliced = encode()
    assert len(sizes) > 1 and max(sizes) == 4
    assert all(torch.equal(a, b) for a, b in zip(sliced[:3], whole[:3], strict=True))


def test_rounding_in_another_order_never_changes_how_many_entries_there_are(always_sparse):
    pytest.importorskip("triton")
    # Scores within a rounding error of the limit: counted by one sum, scored again by another.
    x = torch.rand(4, 300, device=DEVICE)
    weight = torch.rand(300, 1, device=DEVICE).expand(300, 200).clone()
    limit = (x @ weight)[0].median()
    code = threshold_encode(
        x, weight, torch.zeros(200, device=DEVICE), threshold=limit, impl="triton"
    )
    assert len(code.acts) == len(code.indices) == code.row_offsets[-1]
    for row, count in enumerate(code.row_offsets.diff().tolist()):
        first = int(code.row_offsets[row])
        latents = code.indices[first : first + count].tolist()
        assert latents == sorted(set(latents)) and all(0 <= j < 200 for j in latents)


@pytest.mark.parametrize("term", ["mse", "step", "quadratic", "tanh"])
@pytest.mark.parametrize("init", [0.0, 0.01, 0.5])
def test_every_gradient_is_that_of_sae_lens(term, init):
    """Their own straight-through functions on dense pre-activations, one loss at a time."""
    theirs = from_sae_lens("saes/jumprelu_sae.py", "rectangle", "Step", "JumpReLU")
    shape, bandwidth = Shape(64, 24, 200, 1), 0.05 if init < 0.1 else 0.4
    inputs = {k: torch.randn_like(v.float()) for k, v in weights(shape).items()}
    inputs["threshold"] = init * torch.rand(shape.F) * 2
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if k != "x"}
    x, W_enc, b_enc, W_dec, b_dec, threshold = (
        inputs[k] for k in ("x", "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )

    def total(l0, acts_times_norms, mse):
        return {
            "mse": mse,
            "step": l0.mean(),
            "quadratic": (2 / 50 * (l0 - 50) ** 2).mean(),
            "tanh": torch.tanh(4 * acts_times_norms).sum() / shape.B,
        }[term]

    z = (x - b_dec) @ W_enc + b_enc
    acts = theirs["JumpReLU"].apply(z, threshold, bandwidth, False)
    their_l0 = theirs["Step"].apply(z, threshold, bandwidth, False).sum(-1)
    error = acts @ W_dec + b_dec - x
    norms = W_dec.detach().norm(dim=1)
    expected = total(their_l0, acts * norms, error.square().sum(-1).mean())

    code, l0 = jumprelu_encode(x, W_enc, b_enc, threshold, bandwidth, b_pre=b_dec)
    found = mse_l1_loss(x, code, W_dec, b_dec)
    got = total(l0, code.acts * norms[code.indices.long()], found.mse)

    assert torch.equal(l0, their_l0)
    assert torch.allclose(code.to_dense(shape.F), acts, atol=1e-5)
    assert code.groups is not None
    assert torch.equal(code.groups.counts().long(), (acts != 0).sum(0))
    assert relative_error(got.detach(), expected.detach()) < 1e-5
    want = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    have = torch.autograd.grad(got, list(leaves.values()), allow_unused=True)
    for name, a, b in zip(leaves, have, want, strict=True):
        zero = torch.zeros_like(leaves[name])
        error = relative_error(zero if a is None else a, zero if b is None else b)
        assert error < 1e-4, f"d{term}/d{name}: {error:.1e}"


def test_band_is_open_at_both_ends():
    """At its edges the threshold has no gradient, and the lower edge is no entry."""
    z = torch.tensor([[0.25, 0.375, 0.5, 0.625, 0.75, 1.0]])
    threshold = torch.full((6,), 0.5, requires_grad=True)
    code, l0 = jumprelu_encode(torch.ones(1, 1), z, torch.zeros(6), threshold, 0.5)
    assert code.indices.tolist() == [1, 2, 3, 4, 5]
    assert code.acts.tolist() == [0, 0, 0.625, 0.75, 1]
    assert l0.tolist() == [3]
    for loss, slope in ((code.acts.sum(), -1.0), (l0.sum(), -2.0)):
        (grad,) = torch.autograd.grad(loss, threshold, retain_graph=True)
        assert grad.tolist() == [0, slope, slope, slope, 0, 0]


def test_frozen_encoder_still_trains_the_threshold():
    inputs = fp32(SHAPES[0])
    threshold = torch.full((256,), 0.5, requires_grad=True)
    code, l0, found = jumprelu(inputs, EAGER, threshold)
    (found.mse + l0.mean()).backward()
    assert threshold.grad is not None and threshold.grad.any()
    assert not any(v.requires_grad for k, v in inputs.items())


@pytest.mark.parametrize("band", [False, True])
def test_small_workspace_gives_the_same_entries(band):
    inputs = fp32(Shape(70, 24, 9000, 1))
    limit = torch.full((9000,), 0.25) - band * 0.1
    encode = lambda: eager.select_above(*encoder(inputs), scale=None, limit=limit)
    whole = encode()
    with workspace(1 << 20), Largest() as largest:
        parts = encode()
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    assert largest.n <= max(len(whole[1]), 9000 * 24, 1 << 17)


def test_rows_without_entries_and_batches_without_rows():
    W_enc, b_enc = torch.ones(3, 5), torch.zeros(5)
    code = threshold_encode(torch.tensor([[-1.0] * 3, [1.0] * 3, [-1.0] * 3]), W_enc, b_enc)
    assert code.row_offsets.tolist() == [0, 0, 5, 5]
    empty = threshold_encode(torch.zeros(0, 3), W_enc, b_enc)
    assert empty.row_offsets.tolist() == [0] and empty.acts.shape == (0,)
    W_enc.requires_grad_()
    nothing, l0 = jumprelu_encode(-torch.ones(2, 3), W_enc, b_enc, torch.ones(5), 0.1)
    (nothing.acts.sum() + l0.sum()).backward()
    assert l0.tolist() == [0, 0] and W_enc.grad is not None and not W_enc.grad.any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("impl", EVERY_IMPL)
def test_nan_and_infinity(impl, always_sparse):
    x, b_enc = torch.tensor([[torch.nan], [torch.inf], [1.0]]), torch.zeros(3)
    W_enc = torch.tensor([[1.0, -1.0, 1.0]])
    code = threshold_encode(x, W_enc, b_enc, impl=impl)
    assert code.row_offsets.tolist() == [0, 3, 5, 7]
    assert code.acts[:3].isnan().all() and code.acts[3:].tolist() == [torch.inf] * 2 + [1.0] * 2
    code, l0 = jumprelu_encode(x, W_enc, b_enc, torch.full((3,), 0.5), 0.25, impl=impl)
    assert l0.tolist() == [3, 2, 2]
    loss = mse_l1_loss(x, code, torch.ones(3, 1), torch.zeros(1), impl=impl)
    assert loss.mse.isnan() and code.acts[:3].isnan().all()


def test_half_precision_copy_is_read_and_the_master_learns():
    inputs = fp32(SHAPES[0])
    W_enc = inputs["W_enc"].requires_grad_()
    lone = torch.zeros_like(W_enc).bfloat16()
    code = threshold_encode(inputs["x"], W_enc, inputs["b_enc"] + 1, W_compute=lone)
    assert torch.equal(code.acts.view(16, 256)[0], inputs["b_enc"] + 1)
    code.acts.sum().backward()
    assert W_enc.grad is not None and W_enc.grad.any()


def test_row_optimizer_gets_the_pairs():
    inputs = fp32(SHAPES[0])
    leaves = [inputs["W_enc"].clone().requires_grad_() for _ in range(2)]
    sink = collect_row_grads(leaves[1])
    for W_enc in leaves:
        mixed(threshold_encode(inputs["x"], W_enc, inputs["b_enc"], threshold=0.5).acts).backward()
    assert leaves[1].grad is None and len(sink) == 1 and leaves[0].grad is not None
    assert torch.allclose(sink[0].block(0, 256), leaves[0].grad.t(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize(
    "name, impl", [*product(["threshold", "jumprelu"], COMPILED), ("relu_l1", EAGER)]
)
def test_compiles_without_graph_breaks(name, impl, always_sparse):
    inputs = {k: v.requires_grad_() for k, v in fp32(Shape(4, 12, 40, 1)).items()}
    inputs["threshold"] = torch.full((40,), 0.5, requires_grad=True)

    def step(i):
        x, b_dec = i["x"], i["b_dec"]
        if name == "relu_l1":
            arguments = encoder(i, "W_dec", "b_dec")
            return relu_l1_loss(*arguments, l1_coefficient=0.1, b_pre=b_dec, impl=EAGER).total
        if name == "jumprelu":
            _, l0, found = jumprelu(i, impl, i["threshold"])
            return found.mse + 0.1 * l0.mean()
        code = threshold_encode(*encoder(i), threshold=0.3, b_pre=b_dec, impl=impl)
        return mse_l1_loss(x, code, i["W_dec"], b_dec, impl=impl).mse

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for i in (inputs, inputs | {"x": torch.randn(4, 12, requires_grad=True)}):
            grads = [
                torch.autograd.grad(f(i), list(i.values()), allow_unused=True)
                for f in (step, compiled)
            ]
            for plain, traced in zip(*grads, strict=True):
                assert plain is traced is None or torch.equal(plain, traced)


def test_ops_are_registered_as_they_behave(always_sparse):
    inputs = fp32(Shape(5, 6, 20, 1))
    limit, scale = torch.full((20,), 0.5), torch.full((20,), 2.0)
    for scaled, impl in product((None, scale), COMPILED):
        arguments = (*encoder(inputs), scaled, limit, impl)
        torch.library.opcheck(torch.ops.fastsae.select_above.default, arguments)
    for needs_grads in (True, False):
        arguments = (*encoder(inputs, "W_dec", "b_dec", "b_dec"), 0.5, 1.0, needs_grads)
        torch.library.opcheck(torch.ops.fastsae.relu_l1_sums.default, arguments)


def test_bad_arguments_are_refused():
    good = (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5))
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        threshold_encode(*good, threshold=-1.0)
    with pytest.raises(ValueError, match="threshold must be at least 0, got nan"):
        threshold_encode(*good, threshold=torch.nan)
    with pytest.raises(ValueError, match=r"threshold must have shape \[F\] = \[5\], got \[4\]"):
        threshold_encode(*good, threshold=torch.ones(4))
    with pytest.raises(TypeError, match="threshold must be a floating dtype"):
        threshold_encode(*good, threshold=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scale must have shape \[F\] = \[5\], got \[4\]"):
        threshold_encode(*good, scale=torch.ones(4))
    with pytest.raises(ValueError, match=r"W_compute must have shape W_enc's = \[3, 5\]"):
        threshold_encode(*good, W_compute=torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\]"):
        threshold_encode(torch.ones(1, 2, 3), *good[1:])
    with pytest.raises(RuntimeError, match=r"impl must be one of \['eager', 'reference'\]"):
        relu_l1_loss(*good, torch.ones(5, 3), torch.ones(3), l1_coefficient=0.1, impl="triton")
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\]"):
        jumprelu_encode(torch.ones(1, 2, 3), *good[1:], torch.ones(5), 0.1)
    with pytest.raises(ValueError, match=r"threshold must have shape \[F\] = \[5\], got \[\]"):
        jumprelu_encode(*good, torch.tensor(0.5), 0.1)
    with pytest.raises(ValueError, match="bandwidth must be above 0, got 0"):
        jumprelu_encode(*good, torch.ones(5), 0.0)
    with pytest.raises(ValueError, match=r"W_dec must have shape \[F, D\] = \[5, 3\]"):
        relu_l1_loss(*good, torch.ones(4, 3), torch.ones(3), l1_coefficient=1.0)
    with pytest.raises(ValueError, match="lp_norm must be above 0, got 0"):
        relu_l1_loss(*good, torch.ones(5, 3), torch.ones(3), l1_coefficient=1.0, lp_norm=0.0)


def test_more_entries_than_offsets_can_count_are_refused(monkeypatch):
    monkeypatch.setattr(eager, "MOST_ENTRIES", 9)
    with pytest.raises(ValueError, match="threshold must leave at most .*, got 10; encode fewer"):
        threshold_encode(torch.ones(2, 3), torch.ones(3, 5), torch.ones(5))
