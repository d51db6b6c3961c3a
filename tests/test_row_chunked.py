"""The row-chunked loss and the row norms against ordinary autograd, in fp64."""

from typing import Any

import pytest
import torch

from fastsae_kernels import (
    ChunkSums,
    collect_row_grads,
    release_row_grads,
    row_chunked_loss,
    row_norms,
    workspace,
)

B, D, F = 301, 12, 2000


def parameters() -> Any:
    torch.manual_seed(0)
    W_enc = torch.randn(F, D, dtype=torch.float64).t().requires_grad_()
    W_dec = torch.randn(F, D, dtype=torch.float64).requires_grad_()
    return W_enc, W_dec, torch.randn(F, dtype=torch.float64).requires_grad_()


def chunk_sums(W_enc, W_dec, b_enc, seen=None):
    def sums(x):
        if seen is not None:
            seen.append(len(x))
        acts = (x @ W_enc + b_enc).relu()
        err = acts @ W_dec - x
        terms = {"mse": err.square().sum(), "l1": 0.3 * (acts * row_norms(W_dec)).sum()}
        return ChunkSums(terms, err, (acts != 0).sum(0))

    return sums


def rows():
    torch.manual_seed(1)
    return torch.randn(B, D, dtype=torch.float64)


@pytest.mark.parametrize("term", ["mse", "l1", "total"])
def test_chunks_add_up_to_the_dense_loss_and_its_gradients(term):
    learned, x = parameters(), rows()
    seen: list[int] = []
    weights = {name: 1.0 if term in (name, "total") else 0.0 for name in ("mse", "l1")}

    def weighted(x):
        found = chunk_sums(*learned, seen=seen)(x)
        return found._replace(terms={n: weights[n] * t for n, t in found.terms.items()})

    with workspace(1 << 20):
        found = row_chunked_loss(weighted, [x], learned, d_sae=F)
    assert len(seen) > 4 and len(set(seen)) == 2, "chunks of two sizes"
    W_enc, W_dec, b_enc = learned
    acts = (x @ W_enc + b_enc).relu()
    err = acts @ W_dec - x
    dense = {
        "mse": err.square().sum(-1).mean(),
        "l1": 0.3 * (acts * W_dec.norm(dim=1)).sum(-1).mean(),
    }
    want: Any = sum(weights[name] * value for name, value in dense.items())
    assert torch.allclose(found.total, want, rtol=1e-12)
    assert torch.allclose(found.err, err, rtol=1e-10)
    assert torch.equal(found.counts, (acts != 0).sum(0))
    got = torch.autograd.grad(2.5 * found.total, learned, materialize_grads=True)
    expected = torch.autograd.grad(2.5 * want, learned, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12) and a.stride() == b.stride()


def test_dictionary_gradients_go_to_the_row_optimizer():
    learned, x = parameters(), rows()
    want = torch.autograd.grad(
        row_chunked_loss(chunk_sums(*learned), [x], learned, d_sae=F).total, learned
    )
    W_enc, W_dec, b_enc = learned
    kept = {weight: collect_row_grads(weight) for weight in (W_enc, W_dec)}
    row_chunked_loss(chunk_sums(*learned), [x], learned, d_sae=F).total.backward()
    for weight, gradient in zip((W_enc, W_dec), want, strict=False):
        assert weight.grad is None
        total: Any = sum(part.block(0, F) for part in kept[weight])
        by_latent = gradient if gradient.is_contiguous() else gradient.t()
        assert torch.allclose(total, by_latent, rtol=1e-9)
        release_row_grads(weight)
    assert torch.allclose(b_enc.grad, want[2], rtol=1e-9)


def test_without_a_gradient_nothing_is_learned():
    learned, x = parameters(), rows()
    with torch.no_grad():
        assert not row_chunked_loss(chunk_sums(*learned), [x], learned, d_sae=F).total.requires_grad
    with pytest.raises(ValueError, match="rows must hold at least one row, got none"):
        row_chunked_loss(chunk_sums(*learned), [x[:0]], learned, d_sae=F)


def test_a_row_of_zeros_has_a_norm_without_gradient():
    weight: Any = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    norms = row_norms(weight)
    norms.sum().backward()
    assert norms.tolist() == [5.0, 0.0]
    assert torch.allclose(weight.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
