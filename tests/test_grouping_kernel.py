"""Segment sums of the kernels against dense sums in fp64."""

import pytest
import torch

from fastsae_kernels import SparseCode, group_by_latent
from fastsae_kernels.code import LatentGroups
from fastsae_kernels.grouping import eager

pytest.importorskip("triton")
kernel = pytest.importorskip("fastsae_kernels.grouping.kernel")
row_sum = pytest.importorskip("fastsae_kernels.grouping.row_sum")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYWHERE = 3


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 pairs, so that a small batch has latents of several."""
    monkeypatch.setattr(kernel, "CHUNK", 8)


def skewed_groups(B=37, K=4, F=23):
    """One latent fires on every row, a few often, some never; every seventh pair is inactive."""
    weights = torch.linspace(1, 0, F).square().expand(B, F).clone()
    weights[:, EVERYWHERE] = 1e6
    weights[:, 11:14] = 0
    indices = torch.multinomial(weights, K).int()
    acts = torch.rand(B, K) + 0.1
    acts[(torch.arange(B * K) % 7 == 0).view(B, K) & (indices != EVERYWHERE)] = 0
    return LatentGroups(*(t.to(DEVICE) for t in group_by_latent(SparseCode(acts, indices), F)))


def dense_sum(groups, coef, operand):
    out = torch.zeros(len(groups.offsets) - 1, operand.shape[1], dtype=torch.float64)
    offsets = groups.offsets.tolist()
    for j, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = operand[groups.rows[first:last].long()].double()
        out[j] = (coef[first:last, None].double() * rows).sum(0).cpu()
    return out


@pytest.mark.parametrize(
    "D, dtype",
    [
        (1, torch.float32),
        (7, torch.bfloat16),
        (33, torch.float32),
        (33, torch.float16),
        (100, torch.bfloat16),
    ],
    ids=str,
)
def test_segment_sums(short_chunks, D, dtype):
    groups = skewed_groups()
    counts = groups.counts()
    assert counts[EVERYWHERE] == 37 and (counts == 0).any() and ((counts > 0) & (counts < 8)).any()
    coef = torch.randn(len(groups.rows), device=DEVICE)
    operand = torch.randn(37, D, device=DEVICE).to(dtype)
    got = kernel.segment_sum(groups, coef, operand)
    assert got.dtype == torch.float32
    assert torch.allclose(got.cpu().double(), dense_sum(groups, coef, operand), atol=1e-5)
    assert not got[counts == 0].any()
    assert torch.equal(got, kernel.segment_sum(groups, coef, operand))


def test_blocks_of_columns_change_no_bit(short_chunks, monkeypatch):
    groups = skewed_groups()
    coef, operand = torch.randn(len(groups.rows), device=DEVICE), torch.randn(37, 33, device=DEVICE)
    whole = kernel.segment_sum(groups, coef, operand)
    monkeypatch.setattr(kernel, "_LEAST_COLS", 16)
    monkeypatch.setattr(kernel, "_MOST_COLS", 16)
    assert torch.equal(kernel.segment_sum(groups, coef, operand), whole)


def test_a_program_has_the_columns_whose_slice_stays_in_cache():
    bf16 = 2 * 8192
    sizes = {D: kernel.slice_columns(D, bf16) for D in (768, 2304, 4096, 100, 65536)}
    assert sizes == {768: 512, 2304: 512, 4096: 512, 100: 128, 65536: 512}
    assert [kernel.slice_columns(4096, bytes_) for bytes_ in (0, 2 * bf16, 64 * bf16)] == [
        2048,
        512,
        512,
    ]


def test_segment_sums_with_chunks_of_their_real_size():
    groups = skewed_groups(B=600, K=2, F=5)
    coef, operand = torch.randn(1200, device=DEVICE), torch.randn(600, 5, device=DEVICE)
    assert groups.counts()[EVERYWHERE] == 600 > 2 * kernel.CHUNK
    *_, partials = kernel.pair_arguments(groups, coef, operand)
    assert len(partials) <= 2 * (1200 // kernel.CHUNK + 1)
    got = kernel.segment_sum(groups, coef, operand)
    assert torch.allclose(got.cpu().double(), dense_sum(groups, coef, operand), atol=1e-4)


def test_a_slice_of_the_offsets_is_a_slice_of_the_sums(short_chunks):
    groups = skewed_groups()
    coef = torch.randn(len(groups.rows), device=DEVICE)
    operand = torch.randn(37, 5, device=DEVICE)
    whole = kernel.segment_sum(groups, coef, operand)
    for part in (slice(0, 1), slice(2, 9), slice(3, 4), slice(4, 23), slice(11, 14)):
        some = groups._replace(offsets=groups.offsets[part.start : part.stop + 1])
        assert torch.equal(kernel.segment_sum(some, coef, operand), whole[part])


def test_segment_totals(short_chunks, monkeypatch):
    monkeypatch.setattr(kernel, "_TILE_LATENTS", 8)
    monkeypatch.setattr(kernel, "_TILE_PAIRS", 4)
    groups = skewed_groups()
    coef = torch.randn(len(groups.rows), device=DEVICE)
    truth = dense_sum(groups, coef, torch.ones(37, 1, device=DEVICE)).squeeze(1)
    got = kernel.segment_total(groups, coef)
    assert torch.allclose(got.cpu().double(), truth, atol=1e-5)
    assert not got[groups.counts() == 0].any()
    assert torch.equal(got, kernel.segment_total(groups, coef))


def test_nan_reaches_the_latents_of_its_row_and_no_other(short_chunks):
    groups = skewed_groups()
    coef, operand = torch.ones(len(groups.rows), device=DEVICE), torch.ones(37, 5, device=DEVICE)
    operand[20] = float("nan")
    latents = torch.repeat_interleave(torch.arange(23, device=DEVICE), groups.counts())
    hit = torch.zeros(23, dtype=torch.bool, device=DEVICE)
    hit[latents[groups.rows[: len(latents)] == 20]] = True
    assert hit[EVERYWHERE] and hit.sum() > 1
    assert torch.equal(kernel.segment_sum(groups, coef, operand).isnan().all(1), hit)
    coef = coef.masked_fill(groups.rows == 20, float("nan"))
    assert torch.equal(kernel.segment_total(groups, coef).isnan(), hit)


@pytest.mark.parametrize("B", [0, 12])
def test_without_active_pairs_all_sums_are_zero(short_chunks, B):
    code = SparseCode(torch.zeros(B, 3), torch.arange(3, dtype=torch.int32).expand(B, 3))
    groups = LatentGroups(*(t.to(DEVICE) for t in group_by_latent(code, 9)))
    coef, operand = torch.ones(B * 3, device=DEVICE), torch.ones(B, 5, device=DEVICE)
    assert torch.equal(kernel.segment_sum(groups, coef, operand), operand.new_zeros(9, 5))
    assert torch.equal(kernel.segment_total(groups, coef), operand.new_zeros(9))


def test_partial_sums_stay_bounded_for_wide_rows():
    sizes = [kernel.chunk_of(D) for D in (16, 8192, 65536)]
    assert sizes == [kernel.CHUNK, kernel.CHUNK, 8 * kernel.CHUNK]


ROW_SUMS = {
    "one block": (100, 16, torch.float32),
    "odd": (301, 7, torch.bfloat16),
    "several of columns": (130, 600, torch.float16),
    "most blocks": (1000, 33, torch.float32),
    "no rows": (0, 5, torch.float32),
}


@pytest.mark.parametrize("run", ["kernel", "eager"])
@pytest.mark.parametrize("name", ROW_SUMS)
def test_weighted_row_sums(monkeypatch, name, run):
    F, D, dtype = ROW_SUMS[name]
    monkeypatch.setattr(row_sum, "_MOST_BLOCKS", 4)
    monkeypatch.setattr(eager, "workspace_bytes", lambda: 4 * D * 90)
    of = (row_sum if run == "kernel" else eager).weighted_row_sum
    table, weights = torch.randn(F, D, device=DEVICE).to(dtype), torch.randn(F, device=DEVICE)
    got = of(table, weights)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), weights.double() @ table.double(), atol=1e-4)
    assert torch.equal(got, of(table, weights))
    # Neither the memory order nor a view of more columns matters.
    assert torch.allclose(of(table.t().contiguous().t(), weights), got, atol=1e-4)
    assert torch.allclose(of(table[:, 1:], weights), got[1:], atol=1e-4)
