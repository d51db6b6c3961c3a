"""Every op against the reference and the best plain PyTorch, parity first.

    python -m bench.ops                                   # all ops at smollm2-135m-16k, on a CPU
    python -m bench.ops --op topk_encode --case smollm2-135m-65k
    python -m bench.ops --device cuda --case gemma-2-2b-131k

The ceilings of the machine (GEMM, copy, gather) are measured in the same run. `roofline` is the
time that the op's product and its bytes, each read or written once, take at those ceilings, over
the time measured. On a GPU rows, scores and the copies of the weights that the ops read are bf16.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import CASES, Case, find_case, rows
from bench.measure import interleaved, quantiles
from bench.record import append
from bench.roofline import Work
from fastsae_kernels import (
    DenseGrad,
    Impl,
    SparseCode,
    aux_topk,
    group_by_latent,
    mse_l1_loss,
    row_adam,
    sparse_decode,
    topk_encode,
)
from fastsae_kernels._dispatch import interpreted
from fastsae_kernels._row_grads import PairGrad
from fastsae_kernels.decode.ops import pair_dots
from fastsae_kernels.grouping.ops import segment_sum

PARITY = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Relative difference allowed to a rival that computes in that dtype."""

Run = Callable[[], Tensor]
"""Does the work once and returns the value that parity is checked on."""


class Inputs:
    """What the ops and their rivals read. W_enc and W_dec are the fp32 masters."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        W = torch.randn(case.F, case.D, device=device, generator=generator)
        # Masters that their copies represent exactly, so that those who read either agree.
        W = W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True)).to(self.dtype)
        self.x = rows(case).to(device, self.dtype)
        self.W_enc = W.to(torch.float32, copy=True).t().requires_grad_()
        self.W_dec = W.to(torch.float32, copy=True).requires_grad_()
        self.b_enc = torch.zeros(case.F, device=device, requires_grad=True)
        self.b_dec = torch.zeros(case.D, device=device, requires_grad=True)
        self.half = W
        """[F, D], the encoder's and the decoder's weights as the products read them."""
        kernels = device == "cuda" or interpreted()
        self.impls = [Impl.TRITON, Impl.EAGER] if kernels else [Impl.EAGER]

    def code(self) -> SparseCode:
        with torch.no_grad():
            return topk_encode(self.x, self.W_enc, self.b_enc, self.case.K, W_compute=self.half.t())

    def compiled(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Inductor's C++ takes minutes to build on a CPU; the graph is the same.
        return torch.compile(run, backend="inductor" if self.device == "cuda" else "aot_eager")


def backward(loss: Tensor, *inputs: Tensor) -> Tensor:
    """Run the backward pass; the first gradient stands for all of them."""
    return torch.autograd.grad(loss, inputs)[0]


def topk_encode_runs(t: Inputs) -> dict[str, Run]:
    k, half, bias = t.case.K, t.half.t(), t.b_enc.detach().to(t.dtype)

    def plain() -> Tensor:
        return torch.addmm(bias, t.x, half).relu().topk(k, dim=1).values

    def ours(impl: Impl) -> Tensor:
        with torch.no_grad():
            return topk_encode(t.x, t.W_enc, t.b_enc, k, W_compute=half, impl=impl).acts

    return {
        **_by_impl(t, ours),
        "mm": lambda: torch.mm(t.x, half),
        "mm + torch.topk": plain,
    }


def topk_encode_backward_runs(t: Inputs) -> dict[str, Run]:
    k, weights = t.case.K, (t.W_enc, t.b_enc)

    def plain() -> Tensor:
        scores = torch.addmm(t.b_enc.to(t.dtype), t.x, t.W_enc.to(t.dtype))
        return backward(scores.relu().topk(k, dim=1).values.float().sum(), *weights)

    def ours(impl: Impl) -> Tensor:
        code = topk_encode(t.x, *weights, k, W_compute=t.half.t(), impl=impl)
        return backward(code.acts.sum(), *weights)

    return {**_by_impl(t, ours), "mm + torch.topk": plain}


def sparse_decode_runs(t: Inputs) -> dict[str, Run]:
    code, b_dec = t.code(), t.b_dec.detach()
    wide, acts = code.indices.long(), code.acts.to(t.dtype)

    def gathered(indices: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * acts.unsqueeze(2)).sum(1, dtype=torch.float32)

    by_inductor = t.compiled(gathered)
    return {
        **_by_impl(t, lambda impl: sparse_decode(code, t.half, b_dec, impl=impl)),
        "embedding_bag int64": lambda: F.embedding_bag(
            wide, t.half, per_sample_weights=acts, mode="sum"
        ),
        "torch.compile": lambda: by_inductor(wide, acts, t.half),
    }


def mse_forward_runs(t: Inputs) -> dict[str, Run]:
    code, b_dec, W_dec = t.code(), t.b_dec.detach(), t.W_dec.detach()
    acts = code.acts.requires_grad_()
    made = SparseCode(acts, code.indices)
    wide, narrow = code.indices.long(), acts.detach().to(t.dtype)

    def ours(impl: Impl) -> Tensor:
        return mse_l1_loss(t.x, made, W_dec, b_dec, W_compute=t.half, impl=impl).mse

    def plain() -> Tensor:
        x_hat = F.embedding_bag(wide, t.half, per_sample_weights=narrow, mode="sum")
        return (x_hat.float() - t.x.float()).square().sum(1).mean()

    return {**_by_impl(t, ours), "embedding_bag": plain}


def mse_l1_loss_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    acts, wide = code.acts.requires_grad_(), code.indices.long()

    def ours(impl: Impl) -> Tensor:
        made = SparseCode(acts, code.indices)
        found = mse_l1_loss(t.x, made, t.W_dec, t.b_dec, W_compute=t.half, impl=impl)
        return backward(found.mse + found.l1, acts, t.W_dec)

    def bag() -> Tensor:
        x_hat = F.embedding_bag(wide, t.W_dec, per_sample_weights=acts, mode="sum")
        loss = (x_hat - t.x).square().sum(1).mean() + acts.abs().sum(1).mean()
        return backward(loss, acts, t.W_dec)

    return {**_by_impl(t, ours), "embedding_bag autograd": bag}


def pair_dots_runs(t: Inputs) -> dict[str, Run]:
    code, wide = t.code(), t.code().indices.long()
    x = t.x.float()

    def gathered(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        return (weight[indices] * rows.unsqueeze(1)).sum(2, dtype=torch.float32)

    by_inductor = t.compiled(gathered)
    runs: dict[str, Run] = {
        impl.value: lambda impl=impl: pair_dots(None, code.indices, x, t.half, impl)
        for impl in t.impls
    }
    return {**runs, "torch.compile": lambda: by_inductor(wide, x, t.half)}


def group_by_latent_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    flat = code.indices.reshape(-1).long()

    def plain() -> Tensor:
        flat.argsort(stable=True)
        return flat.bincount(minlength=t.case.F)

    ours = Impl.TRITON if t.device == "cuda" else Impl.EAGER  # they are one here
    return {
        ours.value: lambda: group_by_latent(code, t.case.F).counts(),
        "argsort + bincount": plain,
    }


def segment_sum_runs(t: Inputs) -> dict[str, Run]:
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    latents, by_row = code.indices.reshape(-1).long(), code.acts.reshape(-1, 1)

    def scattered() -> Tensor:
        terms = (operand.unsqueeze(1) * by_row.view(*code.acts.shape, 1)).flatten(0, 1)
        return torch.zeros_like(t.W_dec).index_add_(0, latents, terms)

    runs: dict[str, Run] = {
        impl.value: lambda impl=impl: segment_sum(groups, coef, operand, impl) for impl in t.impls
    }
    return {**runs, "index_add_": scattered}


def aux_topk_runs(t: Inputs) -> dict[str, Run]:
    dead = torch.rand(t.case.F, generator=torch.Generator().manual_seed(1)) < 0.05
    dead, weights = dead.to(t.device), (t.W_enc, t.b_enc, t.W_dec)
    x = t.x.float()

    def ours(impl: Impl) -> Tensor:
        return backward(aux_topk(x, x, dead, *weights, b_pre=t.b_dec, impl=impl), *weights)

    return _by_impl(t, ours)


def row_adam_runs(t: Inputs) -> dict[str, Run]:
    """An update by a gradient that is there."""
    shape = (t.case.F, t.case.D)
    generator = torch.Generator(t.device).manual_seed(2)
    weight, g = (torch.randn(shape, device=t.device, generator=generator) for _ in range(2))
    runs: dict[str, Run] = {}
    for impl in t.impls:
        runs[impl.value] = _row_adam_run(weight, [DenseGrad(g)], impl)
    return {**runs, "torch.optim.Adam(fused)": _fused_adam_run(weight, lambda: g)}


def update_runs(t: Inputs) -> dict[str, Run]:
    """From the pairs of a step to new weights and the copy that the next step reads."""
    code = t.code()
    groups = group_by_latent(code, t.case.F)
    coef, operand = code.acts.reshape(-1)[groups.pairs], t.x.float()
    weight, copy = t.W_dec.detach(), torch.empty_like(t.half, dtype=torch.bfloat16)
    grads = [PairGrad(groups, coef, operand)]
    runs: dict[str, Run] = {}
    for impl in t.impls:
        runs[impl.value] = _row_adam_run(weight, grads, impl, copy)
    ours = t.impls[0]
    summed = lambda: segment_sum(groups, coef, operand, ours)
    return {**runs, "segment_sum, Adam(fused), copy": _fused_adam_run(weight, summed, copy)}


def _row_adam_run(weight: Tensor, grads: Any, impl: Impl, copy: Tensor | None = None) -> Run:
    mine, moments = weight.clone(), (torch.zeros_like(weight), torch.zeros_like(weight))
    steps = iter(range(1, 10**9))

    def run() -> Tensor:
        row_adam(mine, grads, *moments, step=next(steps), lr=1e-3, copy=copy, impl=impl)
        return mine

    return run


def _fused_adam_run(
    weight: Tensor, gradient: Callable[[], Tensor], copy: Tensor | None = None
) -> Run:
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)

    def run() -> Tensor:
        parameter.grad = gradient()
        optimizer.step()
        parameter.grad = None
        if copy is not None:
            copy.copy_(parameter.detach())
        return parameter.detach()

    return run


def _by_impl(t: Inputs, run: Callable[[Impl], Tensor]) -> dict[str, Run]:
    impls = (*t.impls, Impl.REFERENCE)
    return {impl.value: lambda impl=impl: run(impl) for impl in impls}


OPS: dict[str, Callable[[Inputs], dict[str, Run]]] = {
    "topk_encode": topk_encode_runs,
    "topk_encode fwd+bwd": topk_encode_backward_runs,
    "sparse_decode": sparse_decode_runs,
    "mse_l1_loss fwd": mse_forward_runs,
    "mse_l1_loss fwd+bwd": mse_l1_loss_runs,
    "pair_dots": pair_dots_runs,
    "group_by_latent": group_by_latent_runs,
    "segment_sum": segment_sum_runs,
    "aux_topk 5% dead fwd+bwd": aux_topk_runs,
    "row_adam": row_adam_runs,
    "row_adam from pairs": update_runs,
}
NO_RIVAL = ("mm",)
"""A part of the work: timed, with nothing to compare."""
BY_NORM = ("topk_encode fwd+bwd",)
"""Scores that were rounded to bf16 choose other latents near the k-th: norms are compared."""


def work(name: str, case: Case, element: int) -> Work | None:
    """What no implementation can avoid, every input read once and every output written once.

    `element` is the size of rows and copies; gradients, errors, masters and moments are fp32.
    """
    B, D, F, K = case.B, case.D, case.F, case.K
    product, dictionary, rows = 2.0 * B * D * F, 4.0 * F * D, float(B * D)
    table = float(element * D * min(F, B * K))  # rows of W_dec that are read at all
    found = {
        "topk_encode": (product, 0.0),
        "topk_encode fwd+bwd": (product, element * rows + dictionary),
        "sparse_decode": (0.0, table + 4 * rows),
        "mse_l1_loss fwd": (0.0, table + (4 + element) * rows),
        "mse_l1_loss fwd+bwd": (0.0, table + (8 + element) * rows + dictionary),
        "pair_dots": (0.0, table + 4 * rows),
        "segment_sum": (0.0, 4 * rows + dictionary),
        "row_adam": (0.0, 7 * dictionary),
        "row_adam from pairs": (0.0, 4 * rows + 6.5 * dictionary),
    }.get(name)
    return None if found is None else Work(*found)


def four_digits(value: float) -> float:
    """Of significance: what a tiny case reaches must not round to nothing."""
    return float(f"{value:.4g}")


def ceilings(case: Case, device: str = "cpu") -> dict[str, float]:
    """GFLOP/s of a product of the case's shape, GB/s of a copy and of a gather of its rows."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    columns = min(case.F, 131_072)
    make = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    x, W, out = make(case.B, case.D), make(columns, case.D).t(), make(case.B, columns)
    n_bytes = (4 << 30) if device == "cuda" else (64 << 20)
    source = torch.randint(1 << 40, (n_bytes // 8,), device=device)  # int64
    target, table = torch.empty_like(source), make(columns, case.D)
    picked = torch.randint(columns, (case.B * min(case.K, 64),), device=device)
    rows_out = make(len(picked), case.D)
    seconds = interleaved(
        {
            "gemm": lambda: torch.mm(x, W, out=out),
            "copy": lambda: target.copy_(source),
            "gather": lambda: torch.index_select(table, 0, picked, out=rows_out),
        },
        7,
        warm_up=3,
        device=device,
    )
    best = {name: min(s) for name, s in seconds.items()}
    flop, moved = 2 * case.B * case.D * columns, 2 * source.numel() * 8
    gathered = 2 * rows_out.numel() * rows_out.element_size()
    return {
        "gemm_gflops": four_digits(flop / best["gemm"] / 1e9),
        "copy_gbps": four_digits(moved / best["copy"] / 1e9),
        "gather_gbps": four_digits(gathered / best["gather"] / 1e9),
    }


def times(
    name: str,
    t: Inputs,
    repeats: int,
    limits: dict[str, float] | None = None,
    leave_out: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """A row a provider, ours first; one that fails, or fails parity, is shown and not timed."""
    case = t.case
    runs = {p: run for p, run in OPS[name](t).items() if p not in leave_out}
    first = next(iter(runs))
    anchor: Tensor | None = None
    for provider in list(runs):
        try:
            value = runs[provider]().detach()
        except Exception as failure:
            if provider == first:
                raise
            print(f"{name}: {provider} fails ({type(failure).__name__}: {failure}); not timed")
            del runs[provider]
            continue
        if anchor is None:
            anchor = value.clone()
        elif provider not in NO_RIVAL:
            error = _difference(value, anchor, name in BY_NORM)
            if not error <= PARITY[t.dtype]:
                print(f"{name}: {provider} fails parity (relative error {error:.1e}); not timed")
                del runs[provider]
    if interpreted():
        runs = {p: run for p, run in runs.items() if p != Impl.TRITON.value}
    seconds = interleaved(runs, repeats, device=t.device)
    ours = quantiles(seconds[next(iter(seconds))])["ms_p50"]
    shape = {"case": case.name, "B": case.B, "D": case.D, "F": case.F, "K": case.K}
    found = []
    for provider, s in seconds.items():
        row = {"bench": "ops", "op": name, **shape, "provider": provider, **quantiles(s)}
        row["over_ours"] = round(row["ms_p50"] / ours, 2)
        needed = work(name, case, t.x.element_size())
        if limits is not None and needed is not None and provider not in NO_RIVAL:
            row |= needed.row(row["ms_p50"], limits)
        found.append(row)
    return found


def _difference(value: Tensor, anchor: Tensor, by_norm: bool) -> float:
    """Of the values, relative to the norm of all; or of the norms."""
    size = lambda t: torch.linalg.vector_norm(t, dtype=torch.float64).clamp_min(1e-30)
    norm = size(anchor if anchor.is_floating_point() else anchor.double())
    if by_norm:
        return float((size(value) / norm - 1).abs())
    squares = torch.zeros((), dtype=torch.float64, device=anchor.device)
    shape = (-1, anchor.shape[-1]) if anchor.ndim > 1 else (1, -1)
    # In pieces: a dictionary in fp64 does not fit beside itself on every GPU.
    for a, b in zip(
        value.reshape(shape).split(8192), anchor.reshape(shape).split(8192), strict=True
    ):
        squares += (a.double() - b.double()).square().sum()
    return float(squares.sqrt() / norm)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--case", default="smollm2-135m-16k", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    if interpreted():
        raise SystemExit("TRITON_INTERPRET must be unset: interpreted kernels are not timed")
    try:
        case = find_case(args.case)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    limits = ceilings(case, args.device)
    print(f"{case.name}: B={case.B} D={case.D} F={case.F} K={case.K}; ceilings {limits}")
    found, inputs = [], Inputs(case, args.device)
    for name in args.op:
        for row in times(name, inputs, args.repeats, limits):
            found.append(row | limits)
            print(line_of(row), flush=True)
    if args.save:
        print(f"appended to {append(args.save, found)}")


def line_of(row: dict[str, Any]) -> str:
    share = f"{row['roofline']:9.1%} of the roofline" if "roofline" in row else ""
    return (
        f"{row['op']:26}{row['provider']:32}{row['ms_p50']:10.3f} ms"
        f"{row['over_ours']:8.2f} x ours{share}"
    )


if __name__ == "__main__":
    main()
