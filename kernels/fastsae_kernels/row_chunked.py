"""Losses whose latents are too many to keep: dense mathematics, one chunk of rows at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels._row_grads import RowGrad, emit_dense, row_grads_of
from fastsae_kernels._workspace import workspace_bytes


class ChunkSums(NamedTuple):
    """What a chunk of rows adds to a loss."""

    terms: dict[str, Tensor]
    """0-dim sums over the chunk's rows, differentiable, each as it enters the total."""
    err: Tensor
    """[c, D_out]: x_hat - x."""
    counts: Tensor
    """[F]: on how many rows of the chunk each latent fired."""


class RowChunked(NamedTuple):
    """A loss made of chunks."""

    total: Tensor
    """0-dim, differentiable: the sum of `terms`."""
    terms: dict[str, Tensor]
    """0-dim means over all rows, detached."""
    err: Tensor
    """[B, D_out], detached."""
    counts: Tensor
    """[F]."""


def row_chunked_loss(
    chunk_sums: Callable[..., ChunkSums],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    d_sae: int,
    live: int = 10,
) -> RowChunked:
    """sum_t mean_b term_t(row b), where each row's terms depend on that row and the parameters.

    `chunk_sums` is ordinary differentiable PyTorch over [c, F] tensors. It runs on chunks of rows
    that fit the workspace; a chunk's gradients are taken and added up at once and its graph is
    dropped, so that nothing of size [B, F] is saved and memory does not grow with B. For codes that
    are nearly dense, where pairs (row, latent) would take more room than the dense tensor.

    Args:
        chunk_sums: called with the same slice of every one of `rows`.
        rows: tensors [B, ...], constants.
        parameters: what `chunk_sums` reads and may want a gradient; others get none.
        d_sae: F; of shards, which must chunk alike, that of the widest.
        live: tensors [c, F] that a chunk holds at once, forward and backward.

    Raises:
        ValueError: there are no rows.
    """
    n_rows = len(rows[0])
    if n_rows == 0:
        raise ValueError("rows must hold at least one row, got none")
    learned = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    chunk = max(1, workspace_bytes() // (live * d_sae * wide.itemsize))
    gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, wide)) for p in learned]
    sums: dict[str, Tensor] = {}
    errors, counts = [], []
    for part in zip(*(t.detach().split(chunk) for t in rows), strict=True):
        with torch.set_grad_enabled(bool(learned)):
            found = chunk_sums(*part)
            share = torch.stack([*found.terms.values()]).sum() / n_rows
        if learned:
            for total, new in zip(
                gradients, torch.autograd.grad(share, learned, allow_unused=True), strict=True
            ):
                if new is not None:
                    total += new
        for name, value in found.terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / n_rows
        errors.append(found.err.detach())
        counts.append(found.counts)
    total = torch.stack([*sums.values()]).sum()
    if learned:
        sinks = [row_grads_of(p) for p in learned]
        total = _Sum.apply(total, sinks, *learned, *gradients)
        assert isinstance(total, Tensor)
    return RowChunked(total, sums, torch.cat(errors), torch.stack(counts).sum(0))


class _Sum(torch.autograd.Function):
    """Every gradient is known up to one factor with the loss."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, sinks: list[list[RowGrad] | None], *tensors: Tensor
    ) -> Tensor:
        learned, gradients = tensors[: len(sinks)], tensors[len(sinks) :]
        ctx.save_for_backward(*gradients)
        ctx.sinks, ctx.dtypes = sinks, [p.dtype for p in learned]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = []
        for gradient, sink, dtype in zip(ctx.saved_tensors, ctx.sinks, ctx.dtypes, strict=True):
            scaled = gradient * g
            # A sink belongs to a weight with one latent a row; W_enc's row is a column.
            by_latent = scaled if scaled.is_contiguous() else scaled.t()
            kept = emit_dense(sink, by_latent)
            if kept is not None:
                kept = (kept if scaled.is_contiguous() else kept.t()).to(dtype)
            out.append(kept)
        return None, None, *out, *(None,) * len(ctx.saved_tensors)
