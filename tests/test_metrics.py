"""Streaming metrics against their formulas, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastsae.evaluation import DEFINITIONS, ReconstructionMetrics

N, D, F, K = 2500, 13, 40, 5
PER_BATCH = ("ev_saelens_legacy", "ev_sparsify", "ev_dictlearning")
OF_THE_CUTS = (*PER_BATCH, "ev_saebench", "ev_openai")


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g) + 3 * torch.randn(D, generator=g)
    x_hat = 0.9 * x + 0.2 * torch.randn(N, D, generator=g) + 0.1
    indices = torch.stack([torch.randperm(F - 4, generator=g)[:K] for _ in range(N)])
    acts = torch.randn(N, K, generator=g).relu()
    return x, x_hat, indices, acts


def measure(data: Sequence[Tensor], cuts: list[int]) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics(D, F)
    for batch in zip(*(t.tensor_split(cuts) for t in data), strict=True):
        metrics.update(*batch)
    return metrics


def test_one_batch_equals_the_formulas(data):
    x, x_hat, indices, acts = data
    x, x_hat = x.double(), x_hat.double()
    e = x - x_hat
    e2, centred = e.square().sum(1), (x - x.mean(0)).square().sum(1)
    fvu = e2.sum() / centred.sum()
    never = F - len(indices[acts != 0].unique())
    density = indices[acts != 0].bincount(minlength=F).double().sort().values / N
    expected = {
        "n_rows": N,
        "fvu": fvu,
        "mse": e2.mean(),
        "nmse_openai": (e2 / x.square().sum(1)).mean(),
        "ev_saelens": 1 - e2.mean() / (x.square().sum(1).mean() - x.mean(0).square().sum()),
        "ev_saelens_legacy": (1 - e2 / centred).mean(),
        "ev_sparsify": 1 - fvu,
        "ev_dictlearning": 1 - e.var(0).sum() / x.var(0).sum(),
        "ev_saebench": 1 - e2.mean() / (x.square().sum(1).mean() - x.square().mean() ** 2),
        "ev_openai": 1 - fvu,
        "ev_overcomplete": 1 - e.square().mean() / (x - x.mean()).square().mean(),
        "cosine_similarity": torch.cosine_similarity(x, x_hat).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum() / (x * x_hat).sum(),
        "l0": (acts != 0).sum() / N,
        "dead_fraction": never / F,
        "density_p10": 0.0,
        "density_p50": density[F // 2 - 1],
        "density_p90": density[9 * F // 10 - 1],
        "density_max": density[-1],
    }
    result = measure(data, []).result()
    assert list(result) == list(DEFINITIONS) == list(expected)
    assert result == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9)
    assert 0.1 <= result["dead_fraction"] < 0.2


@pytest.mark.parametrize("cuts", [[1], [700, 701, 1900], list(range(100, N, 100))])
def test_batches_do_not_matter(data, cuts: list[int]):
    whole, parts = measure(data, []), measure(data, cuts)
    expected, got = whole.result(), parts.result()
    for name in expected.keys() - set(OF_THE_CUTS):
        assert got[name] == pytest.approx(expected[name], rel=1e-12), name
    assert torch.equal(parts.density, whole.density)


def test_variants_per_batch_average_over_batches(data):
    halves = [
        measure([t[part] for t in data], []).result() for part in (slice(0, 1250), slice(1250, N))
    ]
    result = measure(data, [1250]).result()
    for name in PER_BATCH:
        assert result[name] == pytest.approx((halves[0][name] + halves[1][name]) / 2, rel=1e-12)
        assert result[name] != pytest.approx(measure(data, []).result()[name], rel=1e-9)


def test_the_first_batch_and_the_mean_of_squares_decide_two_variants(data):
    x, x_hat = data[0].double(), data[1].double()
    result, mse = measure(data, [700]).result(), (x - x_hat).square().sum(1).mean()
    spread = (x[:700] - x[:700].mean(0)).square().sum(1).mean()
    assert result["ev_openai"] == pytest.approx(float(1 - mse / spread), rel=1e-9)
    m = (x[:700].square().mean() + x[700:].square().mean()) / 2
    expected = 1 - mse / (x.square().sum(1).mean() - m.square())
    assert result["ev_saebench"] == pytest.approx(float(expected), rel=1e-9)


def test_sums_survive_an_offset_that_float32_does_not(data):
    x, x_hat = data[0].double() + 1e6, data[1].double() + 1e6
    metrics = ReconstructionMetrics(D)
    for a, b in zip(x.split(99), x_hat.split(99), strict=True):
        metrics.update(a, b)
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics.result()["fvu"] == pytest.approx(expected.item(), rel=1e-2)


def test_density_counts_rows(data):
    _, _, indices, acts = data
    dense = torch.zeros(N, F).scatter_(1, indices, acts)
    assert torch.equal(measure(data, [400]).density, (dense != 0).double().mean(0))


def test_flat_and_negative_entries_count(data):
    x, x_hat, _, _ = data
    metrics = ReconstructionMetrics(D, 4)
    metrics.update(x[:2], x_hat[:2], torch.tensor([3, 0, 3]), torch.tensor([-1.0, 0.0, 2.0]))
    assert metrics.result()["l0"] == 1.0
    assert metrics.density.tolist() == [0, 0, 0, 1.0]


def test_perfect_and_mean_reconstructions(data):
    x = data[0]
    perfect, mean = ReconstructionMetrics(D), ReconstructionMetrics(D)
    perfect.update(x, x)
    mean.update(x, x.mean(0).expand_as(x))
    assert perfect.result()["fvu"] == 0.0
    assert perfect.result()["cosine_similarity"] == pytest.approx(1.0)
    assert mean.result()["fvu"] == pytest.approx(1.0)


def test_leading_axes_and_low_precision(data):
    x, x_hat = data[0].bfloat16(), data[1].bfloat16()
    shaped, flat = ReconstructionMetrics(D), ReconstructionMetrics(D)
    shaped.update(x.view(50, 50, D), x_hat.view(50, 50, D))
    flat.update(x.double(), x_hat.double())
    assert shaped.result() == flat.result()


def test_empty_batch_changes_nothing(data):
    metrics = measure(data, [0])
    assert metrics.result() == measure(data, []).result()


def test_nan_is_not_hidden(data):
    x_hat = data[1].clone()
    x_hat[3, 2] = math.nan
    metrics = ReconstructionMetrics(D)
    metrics.update(data[0], x_hat)
    assert math.isnan(metrics.result()["fvu"])


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"^x and x_hat must .* with D = 13, got \[2, 12\] and"):
        ReconstructionMetrics(D).update(torch.zeros(2, 12), torch.zeros(2, 12))


def test_code_of_two_shapes_is_refused(data):
    with pytest.raises(
        ValueError, match=r"^indices and acts must have the same shape, got \[2, 5\]"
    ):
        measure_one = ReconstructionMetrics(D, F)
        measure_one.update(data[0][:2], data[1][:2], data[2][:2], data[3][:3])


@pytest.mark.parametrize("latent", [F, -1])
def test_latent_out_of_range_is_refused(data, latent: int):
    with pytest.raises(ValueError, match=f"^indices must be from 0 to F - 1 = 39, got .*{latent}"):
        ReconstructionMetrics(D, F).update(
            data[0][:1], data[1][:1], torch.tensor([latent]), torch.ones(1)
        )


@pytest.mark.parametrize("d_sae", [None, F])
def test_code_and_d_sae_go_together_or_are_refused(data, d_sae: int | None):
    code = data[2:] if d_sae is None else ()
    with pytest.raises(ValueError, match="^indices and acts must both be given iff d_sae is"):
        ReconstructionMetrics(D, d_sae).update(data[0], data[1], *code)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="^d_in and d_sae must be at least 1, got 13 and 0"):
        ReconstructionMetrics(D, 0)


def test_result_without_rows_is_refused():
    with pytest.raises(RuntimeError, match="^metrics need at least one row, got none"):
        ReconstructionMetrics(D).result()
    with pytest.raises(RuntimeError, match="^density needs d_sae and at least one row"):
        _ = ReconstructionMetrics(D, F).density
