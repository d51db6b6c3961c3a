"""A seeded search for inputs of which an encode selects other values than its definition does.

Each row is drawn by itself and is a case of its own; of `batch_topk_encode` each batch is one. Over
the three dtypes the kernels get more than 2,000 cases, `eager` more than 8,000.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from fastsae_kernels import Impl, batch_topk_encode, threshold_encode, topk_encode
from fastsae_kernels._dispatch import TRITON_INSTALLED
from parity import DEVICE, Shape

IMPLS = [Impl.EAGER, *([Impl.TRITON] if TRITON_INSTALLED else [])]

pytestmark = [
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    pytest.mark.parametrize("impl", IMPLS),
    pytest.mark.parametrize(
        "generator",
        [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))],
        indirect=True,
    ),
]


@pytest.fixture
def generator(request):
    return torch.Generator().manual_seed(request.param)


@pytest.fixture(autouse=True)
def kernels_take_every_shape(monkeypatch):
    if TRITON_INSTALLED:
        from fastsae_kernels.batch_topk import kernel as batch
        from fastsae_kernels.threshold import kernel as threshold
        from fastsae_kernels.topk import kernel as topk

        monkeypatch.setattr(topk, "fits", lambda d_sae, k: d_sae >= 16 * k)
        monkeypatch.setattr(batch, "fits", lambda n, d_sae, n_kept: 0 < n_kept <= n * (d_sae // 16))
        monkeypatch.setattr(threshold, "DENSE_ABOVE", 1.0)


def drawn(generator: torch.Generator, least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


def shapes(draw: Callable[[], Shape]) -> Iterator[Shape]:
    """Drawn anew each time; on a GPU, which compiles for each shape, one of them all along."""
    shape = draw()
    while True:
        yield shape
        shape = shape if DEVICE == "cuda" else draw()


def random_rows(generator: torch.Generator, n_rows: int, d_sae: int) -> Tensor:
    """Rows of a random family each: magnitudes, ties, clusters, signs and gaps at random."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    base = torch.randn(n_rows, d_sae, generator=generator) * 10 ** (6 * draw(n_rows, 1) - 3)
    steps = 2 ** torch.randint(0, 6, (n_rows, 1), generator=generator)
    tied = (base / base.abs().amax(1, keepdim=True) * steps).round()
    ramp = torch.arange(d_sae).float() * (draw(n_rows, 1) - 0.5)
    stride = torch.randint(1, 33, (n_rows, 1), generator=generator)
    comb = torch.where((torch.arange(d_sae) + stride) % stride == 0, base.abs() + 1, base)
    few = torch.where(draw(n_rows, d_sae) < 0.02, base.abs(), -base.abs())
    close = 1 + base / base.abs().amax(1, keepdim=True) / 1024
    kind = torch.randint(0, 7, (n_rows, 1), generator=generator)
    scores = torch.stack([base, tied, ramp, comb, base.clamp(max=0.0), few, close])
    return scores.gather(0, kind.expand(1, n_rows, d_sae)).squeeze(0)


def drawn_case(
    generator: torch.Generator, dtype: torch.dtype, shape: Shape
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """relu(scores) [B, F] in fp32, and x, W_enc, b_enc and a scale that make them exactly.

    A scale is of powers of two, 0 among them, and in one of two cases there is none. One-hot
    rows pick the scores out of weights, whose memory order depends on their width.
    """
    scores = random_rows(generator, shape.B, shape.F).to(dtype)
    places = torch.randperm(shape.D, generator=generator)[: shape.B]
    x = torch.zeros(shape.B, shape.D, dtype=dtype)
    x[torch.arange(shape.B), places] = 1
    weight = torch.randn(shape.F, shape.D, generator=generator).to(dtype)
    weight[:, places] = scores.t()
    W_enc = weight.t() if shape.D % 2 == 0 else weight.t().contiguous()
    b_enc = torch.zeros(shape.F, device=DEVICE)
    exact, scale = scores.float().relu(), None
    if drawn(generator, 0, 1):
        scale = 2.0 ** torch.randint(-2, 3, (shape.F,), generator=generator)
        scale *= torch.rand(shape.F, generator=generator) < 0.9
        exact, scale = exact * scale, scale.to(DEVICE)
    return exact.to(DEVICE), (x.to(DEVICE), W_enc.to(DEVICE), b_enc), scale


def test_topk_encode(generator, impl, dtype):
    # The interpreter takes four times as long over rows eight at a time.
    most_rows = 8 if impl is Impl.EAGER and DEVICE == "cpu" else 128
    least, widest, wanted = (16, 400, 600) if impl is Impl.TRITON else (1, 400, 2000)

    def draw() -> Shape:
        n_rows, d_sae = drawn(generator, 1, most_rows), drawn(generator, least, widest)
        # The kernels' groups are of 16 to 64 latents, by how many of them there are for each of k.
        share = 2 ** drawn(generator, *((4, 8) if impl is Impl.TRITON else (0, 4)))
        k = drawn(generator, 1, max(1, d_sae // share))
        return Shape(n_rows, n_rows + drawn(generator, 0, 8), d_sae, k)

    n_cases = 0
    for shape in shapes(draw):
        exact, inputs, scale = drawn_case(generator, dtype, shape)
        code = topk_encode(*inputs, shape.K, scale=scale, impl=impl)
        indices = code.indices.long()
        assert torch.equal(code.acts, exact.topk(shape.K, dim=1).values), shape
        assert torch.equal(exact.gather(1, indices), code.acts), shape
        assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), shape
        tied = code.acts.diff(dim=1) == 0
        assert (indices.diff(dim=1)[tied] > 0).all(), shape
        n_cases += shape.B
        if n_cases >= wanted:
            break


def test_batch_topk_encode(generator, impl, dtype):
    n_batches, most_rows = (6, 5) if impl is Impl.TRITON else (200, 40)

    def draw() -> Shape:
        n_rows, d_sae = drawn(generator, 1, most_rows), drawn(generator, 16, 140)
        n_kept = drawn(generator, 1, n_rows * (d_sae // 16))
        return Shape(n_rows, n_rows + drawn(generator, 0, 8), d_sae, n_kept)

    for shape in islice(shapes(draw), n_batches):
        exact, inputs, scale = drawn_case(generator, dtype, shape)
        code = batch_topk_encode(*inputs, (shape.K + 0.5) / shape.B, scale=scale, impl=impl)
        rows, latents = code.rows().long(), code.indices.long()
        best = exact.view(-1).topk(shape.K).values
        assert torch.equal(code.acts.sort(descending=True).values, best), shape
        assert torch.equal(exact[rows, latents], code.acts), shape
        assert ((rows * shape.F + latents).diff() > 0).all(), shape


def test_threshold_encode(generator, impl, dtype):
    """Limits are scores of one of the rows, so that there are values at, below and above them."""
    most_rows = 64 if DEVICE == "cuda" else 8
    widest, wanted = (64, 80) if impl is Impl.TRITON else (400, 800)

    def draw() -> Shape:
        n_rows, d_sae = drawn(generator, 1, most_rows), drawn(generator, 1, widest)
        return Shape(n_rows, n_rows + drawn(generator, 0, 8), d_sae, 1)

    n_cases = 0
    for shape in shapes(draw):
        exact, inputs, scale = drawn_case(generator, dtype, shape)
        limit = exact[drawn(generator, 0, shape.B - 1)]
        code = threshold_encode(*inputs, threshold=limit, scale=scale, impl=impl)
        rows, latents = (exact > limit).nonzero(as_tuple=True)
        assert torch.equal(code.rows().long(), rows), shape
        assert torch.equal(code.indices.long(), latents), shape
        assert torch.equal(code.acts, exact[rows, latents]), shape
        n_cases += shape.B
        if n_cases >= wanted:
            break
