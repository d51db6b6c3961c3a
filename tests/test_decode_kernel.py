"""gather_sum and pair_dots: the Triton kernels against dense fp64 products of the same numbers."""

import pytest
import torch

pytest.importorskip("triton")

from fastsae_kernels.decode import kernel
from fastsae_kernels.decode.kernel import gather_sum, pair_dots
from parity import DEVICE, SLACK, Shape, relative_error

SHAPES = [
    Shape(5, 33, 40, 8),
    Shape(1, 7, 11, 3),
    Shape(3, 100, 64, 1),
    Shape(3, 1, 9, 3),
    Shape(2, 300, 200, 70),
]
# All shapes in fp32, the first in every dtype, and the one of several blocks in bf16.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(SHAPES[0], torch.bfloat16), (SHAPES[0], torch.float16), (SHAPES[-1], torch.bfloat16)]
ids = lambda d: str(d).removeprefix("torch.")
both = pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
every_case = pytest.mark.parametrize("shape, dtype", CASES, ids=ids)


def code_of(shape, ragged, dtype=torch.float32):
    """(row_offsets, indices, acts); ragged rows hold 0 to 2 K latents, the first one none."""
    counts = [shape.K] * shape.B
    if ragged:
        counts = [min(2 * shape.K * b // max(1, shape.B - 1), shape.F) for b in range(shape.B)]
    rows = [torch.randperm(shape.F, device=DEVICE)[:count].int() for count in counts]
    indices = torch.cat(rows) if ragged else torch.stack(rows)
    acts = torch.randn(indices.shape, device=DEVICE).to(dtype)
    return offsets_of(counts) if ragged else None, indices, acts


def offsets_of(counts):
    ends = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    return ends.int()


def dense_of(shape, row_offsets, indices, acts):
    """[B, F] fp64."""
    counts = torch.full((shape.B,), shape.K, device=DEVICE)
    counts = counts if row_offsets is None else row_offsets.diff()
    rows = torch.arange(shape.B, device=DEVICE).repeat_interleave(counts)
    dense = torch.zeros(shape.B, shape.F, dtype=torch.float64, device=DEVICE)
    where = (rows, indices.reshape(-1).long())
    return dense.index_put(where, acts.double().reshape(-1), accumulate=True)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


@both
@every_case
def test_gather_sum(shape, dtype, ragged):
    code = code_of(shape, ragged, dtype)
    weight, bias = randn(shape.F, shape.D, dtype=dtype), randn(shape.D, dtype=dtype)
    truth = dense_of(shape, *code) @ weight.double()
    x_hat = gather_sum(*code, weight)
    assert x_hat.dtype == torch.float32
    assert x_hat.shape == truth.shape
    assert relative_error(x_hat, truth) <= SLACK[torch.float32]
    assert relative_error(gather_sum(*code, weight, bias), truth + bias) <= SLACK[torch.float32]


@both
@every_case
def test_pair_dots(shape, dtype, ragged):
    row_offsets, indices, acts = code_of(shape, ragged)
    weight, rows = randn(shape.F, shape.D, dtype=dtype), randn(shape.B, shape.D)
    dots = pair_dots(row_offsets, indices, rows, weight)
    assert dots.dtype == torch.float32
    assert dots.shape == indices.shape
    ones = torch.ones_like(acts)
    products = rows.double() @ weight.double().t()
    truth = products[dense_of(shape, row_offsets, indices, ones) != 0]
    assert relative_error(sorted_within_rows(dots, row_offsets, indices), truth) <= 1e-6


def sorted_within_rows(values, row_offsets, indices):
    """Flat, each row's values in the order of their latents, as in a dense row."""
    if row_offsets is None:
        return values.gather(1, indices.argsort(1)).reshape(-1)
    cuts = row_offsets.diff().tolist()
    pairs = zip(values.split(cuts), indices.split(cuts), strict=True)
    return torch.cat([v[i.argsort()] for v, i in pairs])


@both
def test_columns_in_several_blocks(monkeypatch, ragged):
    shape = Shape(5, 100, 64, 8)
    row_offsets, indices, acts = code_of(shape, ragged)
    weight, rows = randn(shape.F, shape.D), randn(shape.B, shape.D)
    x_hat = gather_sum(row_offsets, indices, acts, weight, rows[0])
    dots = pair_dots(row_offsets, indices, rows, weight)
    monkeypatch.setattr(kernel, "ROW_BYTES", 64)
    assert kernel.warp_cols(weight) == 16
    narrow = gather_sum(row_offsets, indices, acts, weight, rows[0])
    assert relative_error(narrow, x_hat) <= 1e-6
    assert relative_error(pair_dots(row_offsets, indices, rows, weight), dots) <= 1e-6


@both
def test_same_bits_twice_and_with_wide_indices(ragged):
    shape = Shape(5, 33, 40, 8)
    row_offsets, indices, acts = code_of(shape, ragged)
    weight, rows = randn(shape.F, shape.D), randn(shape.B, shape.D)
    x_hat = gather_sum(row_offsets, indices, acts, weight)
    dots = pair_dots(row_offsets, indices, rows, weight)
    wide = None if row_offsets is None else row_offsets.long()
    for offsets, same in ((row_offsets, indices), (wide, indices.long())):
        assert torch.equal(gather_sum(offsets, same, acts, weight), x_hat)
        assert torch.equal(pair_dots(offsets, same, rows, weight), dots)


def test_nothing_to_add():
    weight, bias = randn(9, 33), randn(33)
    zeros = torch.zeros(4, 3, device=DEVICE)
    assert torch.equal(gather_sum(None, zeros.int(), zeros, weight, bias), bias.expand(4, 33))
    none, no_acts = zeros[:, :0].int(), zeros[:, :0]
    assert torch.equal(gather_sum(None, none, no_acts, weight, bias), bias.expand(4, 33))
    assert pair_dots(None, none, randn(4, 33), weight).shape == (4, 0)
    empty = offsets_of([0, 0, 0])
    flat, no_flat_acts = none.reshape(-1), no_acts.reshape(-1)
    assert torch.equal(gather_sum(empty, flat, no_flat_acts, weight, bias), bias.expand(3, 33))
    assert pair_dots(empty, flat, randn(3, 33), weight).shape == (0,)


def test_no_rows():
    weight = randn(9, 33)
    acts = randn(0, 3)
    assert gather_sum(None, acts.int(), acts, weight).shape == (0, 33)
    assert pair_dots(None, acts.int(), randn(0, 33), weight).shape == (0, 3)
    assert gather_sum(offsets_of([]), acts.reshape(-1).int(), randn(0), weight).shape == (0, 33)


@both
@numpy_may_warn
def test_nan_and_inf_stay_in_their_rows(ragged):
    """Latent 0 is what slots that do not exist point at: nobody named it, nobody may see it."""
    indices = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 5, 7]], device=DEVICE, dtype=torch.int32)
    acts = randn(3, 3)
    weight, rows = randn(8, 33), randn(3, 33)
    weight[0] = float("nan")
    row_offsets = None
    if ragged:
        row_offsets, indices, acts = offsets_of([3, 3, 3]), indices.reshape(-1), acts.reshape(-1)
    clean = gather_sum(row_offsets, indices, acts, weight)
    assert clean.isfinite().all()
    assert pair_dots(row_offsets, indices, rows, weight).isfinite().all()

    for bad in (float("nan"), float("inf")):
        broken = acts.clone()
        broken.view(-1)[4] = bad
        x_hat = gather_sum(row_offsets, indices, broken, weight)
        assert not x_hat[1].isfinite().any()
        assert torch.equal(x_hat[[0, 2]], clean[[0, 2]])

    silent = acts.clone()
    silent.view(-1)[4] = 0
    weight[5, 32] = float("nan")
    x_hat = gather_sum(row_offsets, indices, silent, weight)
    assert x_hat[:, :32].isfinite().all()
    assert x_hat[:, 32].isnan().tolist() == [False, True, True]
    found = pair_dots(row_offsets, indices, rows, weight).reshape(3, 3).isnan()
    assert found.tolist() == (indices.reshape(3, 3) == 5).tolist()


def test_strides():
    shape = Shape(5, 33, 40, 8)
    _, indices, acts = code_of(shape, ragged=False)
    weight, rows, bias = randn(shape.F, shape.D), randn(shape.B, shape.D), randn(shape.D)
    x_hat, dots = (
        gather_sum(None, indices, acts, weight, bias),
        pair_dots(None, indices, rows, weight),
    )
    wide = torch.full((shape.F, shape.D + 7), float("nan"), device=DEVICE)
    wide[:, 3 : 3 + shape.D] = weight
    spread = wide[:, 3 : 3 + shape.D]
    across = lambda t: t.t().contiguous().t()
    every_other = bias.repeat_interleave(2)[::2]
    found = gather_sum(None, across(indices), across(acts), spread, every_other)
    assert relative_error(found, x_hat) <= 1e-6
    for other in (across(rows), rows.repeat(1, 2)[:, : shape.D]):
        assert relative_error(pair_dots(None, across(indices), other, spread), dots) <= 1e-6


def test_transposed_weight_is_refused():
    shape = Shape(5, 33, 40, 8)
    row_offsets, indices, acts = code_of(shape, ragged=False)
    weight = randn(shape.D, shape.F).t()
    with pytest.raises(ValueError, match=r"W_dec must hold .* side by side .*\(1, 40\)"):
        gather_sum(row_offsets, indices, acts, weight)
    with pytest.raises(ValueError, match="W_dec must hold"):
        pair_dots(row_offsets, indices, randn(shape.B, shape.D), weight)
