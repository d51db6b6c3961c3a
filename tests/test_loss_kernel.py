"""mse_l1_rows: both Triton kernels against the dense fp64 mathematics of the same numbers."""

import pytest
import torch

pytest.importorskip("triton")

from fastsae_kernels import Impl, SparseCode, mse_l1_loss
from fastsae_kernels.decode import kernel as decode_kernel
from fastsae_kernels.loss import kernel, one_visit
from fastsae_kernels.loss.kernel import mse_l1_rows
from fastsae_kernels.loss.one_visit import MOST_SLOTS
from parity import DEVICE, SLACK, Shape, relative_error

SHAPES = [
    Shape(5, 33, 40, 8),
    Shape(1, 7, 11, 3),
    Shape(3, 100, 64, 1),
    Shape(3, 1, 9, 3),
    Shape(2, 530, 200, 70),
]
# All shapes in fp32, the first in every dtype, and the one of several blocks in bf16.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(SHAPES[0], torch.bfloat16), (SHAPES[0], torch.float16), (SHAPES[-1], torch.bfloat16)]
ids = lambda d: str(d).removeprefix("torch.")
numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def visit_twice(monkeypatch):
    monkeypatch.setattr(kernel, "MOST_SLOTS", -1)


@pytest.fixture(params=["one visit", "two visits"])
def either_kernel(request, monkeypatch):
    if request.param == "two visits":
        visit_twice(monkeypatch)


@pytest.fixture(params=["one visit", "two visits", "ragged"])
def ragged(request, monkeypatch):
    if request.param == "two visits":
        visit_twice(monkeypatch)
    return request.param == "ragged"


def problem(shape, ragged=False, dtype=torch.float32, weighted=True):
    """Arguments of `mse_l1_rows`; ragged rows hold 0 to 2 K latents, the first one none."""
    counts = [shape.K] * shape.B
    if ragged:
        counts = [min(2 * shape.K * b // max(1, shape.B - 1), shape.F) for b in range(shape.B)]
    rows = [torch.randperm(shape.F, device=DEVICE)[:count].int() for count in counts]
    indices = torch.cat(rows) if ragged else torch.stack(rows)
    ends = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    return {
        "x": randn(shape.B, shape.D, dtype=dtype),
        "row_offsets": ends.int() if ragged else None,
        "indices": indices,
        "acts": randn(*indices.shape, dtype=dtype),
        "W_dec": randn(shape.F, shape.D, dtype=dtype),
        "b_dec": randn(shape.D, dtype=dtype),
        "l1_weight": randn(shape.F, dtype=dtype).abs() if weighted else None,
    }


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def dense_truth(p):
    """The four results in fp64; the dots are half the gradient of the squared errors' sum."""
    n_rows, d_sae = len(p["x"]), len(p["W_dec"])
    acts = p["acts"].double().requires_grad_()
    counts = torch.full((n_rows,), acts.shape[-1], device=DEVICE)
    counts = counts if p["row_offsets"] is None else p["row_offsets"].diff()
    rows = torch.arange(n_rows, device=DEVICE).repeat_interleave(counts)
    where = (rows, p["indices"].reshape(-1).long())
    empty = torch.zeros(n_rows, d_sae, dtype=torch.float64, device=DEVICE)
    dense = empty.index_put(where, acts.reshape(-1), accumulate=True)
    err = dense @ p["W_dec"].double() + p["b_dec"].double() - p["x"].double()
    row_mse = err.square().sum(1)
    (twice_dots,) = torch.autograd.grad(row_mse.sum(), acts)
    weight = 1.0 if p["l1_weight"] is None else p["l1_weight"].double()
    row_l1 = (dense.abs() * weight).sum(1)
    return row_mse.detach(), row_l1.detach(), err.detach(), twice_dots / 2


def check(found, truth, allowed=SLACK[torch.float32]):
    for name, got, exact in zip(("mse", "l1", "err", "dots"), found, truth, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        assert relative_error(got, exact) <= allowed, name


@pytest.mark.parametrize("shape, dtype", CASES, ids=ids)
def test_matches_dense_fp64(shape, dtype, ragged):
    p = problem(shape, ragged, dtype)
    check(mse_l1_rows(**p, needs_dots=True), dense_truth(p))


def test_without_dots_and_without_weight(ragged):
    p = problem(Shape(5, 33, 40, 8), ragged, weighted=False)
    truth = dense_truth(p)
    check(mse_l1_rows(**p, needs_dots=True), truth)
    *losses, dots = mse_l1_rows(**p, needs_dots=False)
    check([*losses, dots], [*truth[:3], torch.empty(0)])


@pytest.mark.usefixtures("either_kernel")
def test_mixed_dtypes():
    p = problem(Shape(5, 33, 40, 8))
    p |= {"x": p["x"].bfloat16(), "W_dec": p["W_dec"].half(), "indices": p["indices"].long()}
    check(mse_l1_rows(**p, needs_dots=True), dense_truth(p))


def test_columns_in_several_blocks(monkeypatch, ragged):
    p = problem(Shape(2, 100, 64, 40), ragged)
    whole = mse_l1_rows(**p, needs_dots=True)
    monkeypatch.setattr(one_visit, "TILE_BYTES", 1)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 128)
    monkeypatch.setattr(decode_kernel, "ROW_BYTES", 64)
    blocks = mse_l1_rows(**p, needs_dots=True)
    check(blocks, [t.double() for t in whole])
    check(blocks, dense_truth(p))


def test_same_bits_twice(ragged):
    p = problem(Shape(5, 33, 40, 8), ragged)
    first, second = (mse_l1_rows(**p, needs_dots=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.usefixtures("either_kernel")
def test_padding_counts_for_nothing():
    p = problem(Shape(5, 33, 40, 8))
    padded = dict(p)
    padded["indices"] = torch.nn.functional.pad(p["indices"], (0, 3))
    padded["acts"] = torch.nn.functional.pad(p["acts"], (0, 3))
    check(mse_l1_rows(**padded, needs_dots=True), dense_truth(padded))
    nothing = {**p, "acts": torch.zeros_like(p["acts"])}
    row_mse, row_l1, err, _ = mse_l1_rows(**nothing, needs_dots=True)
    assert torch.equal(err, p["b_dec"] - p["x"])
    assert relative_error(row_mse, err.double().square().sum(1)) <= 1e-6
    assert not row_l1.any()


@pytest.mark.usefixtures("either_kernel")
def test_rows_without_entries():
    p = problem(Shape(3, 33, 9, 2))
    flat = {"indices": p["indices"][:0].reshape(-1), "acts": p["acts"][:0].reshape(-1)}
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for nothing in (
        {"indices": p["indices"][:, :0], "acts": p["acts"][:, :0]},
        {**flat, "row_offsets": offsets},
    ):
        _, row_l1, err, dots = mse_l1_rows(**{**p, **nothing}, needs_dots=True)
        assert torch.equal(err, p["b_dec"] - p["x"])
        assert not row_l1.any()
        assert dots.shape == nothing["acts"].shape


def test_no_rows():
    p = problem(Shape(3, 33, 9, 2))
    p |= {name: p[name][:0] for name in ("x", "indices", "acts")}
    shapes = [list(t.shape) for t in mse_l1_rows(**p, needs_dots=True)]
    assert shapes == [[0], [0], [0, 33], [0, 2]]


def test_nan_reaches_the_losses_of_its_rows_only(ragged):
    p = problem(Shape(4, 33, 40, 3))
    indices = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 5, 7], [8, 9, 2]], device=DEVICE).int()
    p["indices"] = indices
    p["W_dec"][0] = p["l1_weight"][0] = float("nan")
    if ragged:
        p |= {"indices": indices.reshape(-1), "acts": p["acts"].reshape(-1)}
        p["row_offsets"] = 3 * torch.arange(5, device=DEVICE, dtype=torch.int32)
    clean = mse_l1_rows(**p, needs_dots=True)
    assert all(t.isfinite().all() for t in clean)

    def nan_rows(**changed):
        mse, l1, err, dots = mse_l1_rows(**{**p, **changed}, needs_dots=True)
        by_row = (mse, l1, err.sum(1), dots.reshape(4, 3).sum(1))
        return [t.isnan().nonzero().flatten().tolist() for t in by_row]

    acts, weight, x = p["acts"].clone(), p["W_dec"].clone(), p["x"].clone()
    acts.view(-1)[3] = x[3, 32] = float("nan")
    assert nan_rows(acts=acts) == [[1], [1], [1], [1]]
    assert nan_rows(x=x) == [[3], [], [3], [3]]
    silent = p["acts"].clone()
    silent.view(-1)[4] = 0
    weight[5, 32] = float("nan")
    assert nan_rows(W_dec=weight, acts=silent) == [[1, 2], [], [1, 2], [1, 2]]


@numpy_may_warn
def test_infinite_act_makes_an_infinite_loss():
    p = problem(Shape(3, 33, 40, 3))
    p["acts"][1, 2] = float("inf")
    row_mse, row_l1, err, _ = mse_l1_rows(**p, needs_dots=False)
    assert err.isinf().all(1).tolist() == row_mse.isinf().tolist() == [False, True, False]
    assert row_l1.isinf().tolist() == [False, True, False]


@numpy_may_warn
@pytest.mark.usefixtures("either_kernel")
def test_infinite_act_makes_no_nan_of_columns_that_do_not_exist():
    p = problem(Shape(3, 33, 40, 3))
    p["acts"][1, 2] = float("inf")
    p["W_dec"].abs_()
    for found in mse_l1_rows(**p, needs_dots=True):
        assert not found.isnan().any()
        assert found.reshape(3, -1).isinf().any(1).tolist() == [False, True, False]


@pytest.mark.usefixtures("either_kernel")
def test_strides():
    p = problem(Shape(5, 33, 40, 8))
    plain = mse_l1_rows(**p, needs_dots=True)
    across = lambda t: t.t().contiguous().t()
    wide = torch.full((40, 40), float("nan"), device=DEVICE)
    wide[:, 3:36] = p["W_dec"]
    spread = {"indices": across(p["indices"]), "acts": across(p["acts"]), "W_dec": wide[:, 3:36]}
    for x in (across(p["x"]), p["x"].repeat(1, 2)[:, :33]):
        found = mse_l1_rows(**{**p, **spread, "x": x}, needs_dots=True)
        check(found, [t.double() for t in plain], 1e-6)


@pytest.mark.parametrize("targets", [(), (3,)], ids=["one target", "three targets"])
@pytest.mark.parametrize("n_slots", [1, 2, 17, 65, MOST_SLOTS, MOST_SLOTS + 1])
@pytest.mark.usefixtures("either_kernel")
def test_gradients_of_each_loss_match_fp64(n_slots, targets):
    n_rows, n_cols, d_sae = 2, 11, 9
    where = torch.randint(d_sae, (n_rows, n_slots), device=DEVICE)
    x = randn(n_rows, *targets, n_cols)
    inputs = {
        "acts": randn(n_rows, n_slots),
        "W_dec": randn(d_sae, *targets, n_cols),
        "b_dec": randn(*targets, n_cols),
        "l1_weight": randn(d_sae).abs(),
    }

    def gradients(losses, leaves):
        """Of each loss by each input it depends on."""
        mse, l1 = losses(**leaves)
        by = lambda loss, *names: torch.autograd.grad(
            loss, [leaves[name] for name in names], retain_graph=True
        )
        of_mse, of_l1 = by(mse, "acts", "W_dec", "b_dec"), by(l1, "acts", "l1_weight")
        return [mse.detach(), l1.detach(), *of_mse, *of_l1, *by(mse * 3 + l1 * 5, *leaves)]

    def kernels(acts, W_dec, b_dec, l1_weight):
        code = SparseCode(acts, where.int())
        return mse_l1_loss(x, code, W_dec, b_dec, l1_weight, impl=Impl.TRITON)[:2]

    def mathematics(acts, W_dec, b_dec, l1_weight):
        x_hat = torch.einsum("bk,bk...->b...", acts, W_dec[where]) + b_dec
        l1 = (acts.abs() * l1_weight[where]).sum(1).mean()
        return (x_hat - x.double()).square().flatten(1).sum(1).mean(), l1

    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    exact = {n: t.double().requires_grad_() for n, t in inputs.items()}
    made = gradients(kernels, leaves)
    for found, truth in zip(made, gradients(mathematics, exact), strict=True):
        assert relative_error(found, truth) <= SLACK[torch.float32]


def test_which_codes_are_gathered_once(monkeypatch):
    launched = []
    launch = one_visit.launch
    monkeypatch.setattr(one_visit, "launch", lambda *a: launched.append(1) or launch(*a))

    def launches(n_slots, ragged=False, needs_dots=True):
        launched.clear()
        mse_l1_rows(**problem(Shape(2, 7, MOST_SLOTS + 1, n_slots), ragged), needs_dots=needs_dots)
        return len(launched)

    assert launches(1) == launches(MOST_SLOTS) == 1
    assert launches(MOST_SLOTS + 1) == launches(3, ragged=True) == 0
    assert launches(3, needs_dots=False) == 0


def test_transposed_weight_is_refused():
    p = problem(Shape(5, 33, 40, 8))
    p["W_dec"] = p["W_dec"].t().contiguous().t()
    with pytest.raises(ValueError, match=r"W_dec must hold .* side by side"):
        mse_l1_rows(**p, needs_dots=True)
