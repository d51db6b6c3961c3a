"""Every op against the reference and the best plain PyTorch, parity first.

    python -m bench.ops                                   # all ops at smollm2-135m-16k
    python -m bench.ops --op topk_encode --case smollm2-135m-65k

The ceilings of the machine (fp32 GEMM, copy) are measured in the same run.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import CASES, Case, rows
from bench.measure import interleaved, quantiles
from bench.providers import Start
from bench.record import append
from fastsae_kernels import (
    DenseGrad,
    SparseCode,
    aux_topk,
    group_by_latent,
    mse_l1_loss,
    row_adam,
    sparse_decode,
    topk_encode,
)

PARITY = 1e-3
Run = Callable[[], Tensor]
"""Does the work once and returns the value that parity is checked on."""


def leaves(case: Case) -> dict[str, Tensor]:
    start = Start.random(case, 0.0)
    return {
        "x": rows(case),
        "W_enc": start.W_enc.requires_grad_(),
        "b_enc": torch.zeros(case.F, requires_grad=True),
        "W_dec": start.W_dec.clone().requires_grad_(),
        "b_dec": torch.zeros(case.D, requires_grad=True),
    }


def backward(loss: Tensor, *inputs: Tensor) -> Tensor:
    """Run the backward pass; the sum of the first gradient stands for all of them."""
    return torch.autograd.grad(loss, inputs)[0].sum()


def topk_encode_runs(case: Case) -> dict[str, Run]:
    t = leaves(case)

    def plain() -> Tensor:
        with torch.no_grad():
            return torch.addmm(t["b_enc"], t["x"], t["W_enc"]).relu().topk(case.K, dim=1).values

    def ours(impl: str) -> Tensor:
        with torch.no_grad():
            return topk_encode(t["x"], t["W_enc"], t["b_enc"], case.K, impl=impl).acts

    return {
        "eager": lambda: ours("eager"),
        "reference": lambda: ours("reference"),
        "mm + torch.topk": plain,
    }


def topk_encode_backward_runs(case: Case) -> dict[str, Run]:
    t = leaves(case)
    weights = (t["W_enc"], t["b_enc"])
    x, W_enc, b_enc = t["x"], *weights

    def plain() -> Tensor:
        acts = torch.addmm(b_enc, x, W_enc).relu().topk(case.K, dim=1).values
        return backward(acts.sum(), *weights)

    def ours(impl: str) -> Tensor:
        return backward(topk_encode(x, W_enc, b_enc, case.K, impl=impl).acts.sum(), *weights)

    return {
        "eager": lambda: ours("eager"),
        "reference": lambda: ours("reference"),
        "mm + torch.topk": plain,
    }


def code_of(case: Case) -> SparseCode:
    t = leaves(case)
    with torch.no_grad():
        return topk_encode(t["x"], t["W_enc"], t["b_enc"], case.K)


def sparse_decode_runs(case: Case) -> dict[str, Run]:
    code, W_dec, b_dec = code_of(case), leaves(case)["W_dec"].detach(), torch.zeros(case.D)
    wide = code.indices.long()
    return {
        "eager": lambda: sparse_decode(code, W_dec, b_dec, impl="eager"),
        "reference": lambda: sparse_decode(code, W_dec, b_dec, impl="reference"),
        "embedding_bag int64": lambda: F.embedding_bag(
            wide, W_dec, per_sample_weights=code.acts, mode="sum"
        ),
    }


def mse_l1_loss_runs(case: Case) -> dict[str, Run]:
    t, code = leaves(case), code_of(case)
    acts, W_dec = code.acts.requires_grad_(), t["W_dec"]
    wide = code.indices.long()

    def ours(impl: str) -> Tensor:
        made = SparseCode(acts, code.indices)
        found = mse_l1_loss(t["x"], made, W_dec, t["b_dec"], impl=impl)
        return backward(found.mse + found.l1, acts, W_dec)

    def plain() -> Tensor:
        x_hat = F.embedding_bag(wide, W_dec, per_sample_weights=acts, mode="sum")
        loss = (x_hat - t["x"]).square().sum(1).mean() + acts.abs().sum(1).mean()
        return backward(loss, acts, W_dec)

    return {
        "eager": lambda: ours("eager"),
        "reference": lambda: ours("reference"),
        "embedding_bag autograd": plain,
    }


def group_by_latent_runs(case: Case) -> dict[str, Run]:
    code = code_of(case)
    flat = code.indices.reshape(-1).long()

    def plain() -> Tensor:
        flat.argsort(stable=True)
        return flat.bincount(minlength=case.F)

    return {
        "eager": lambda: group_by_latent(code, case.F).counts(),
        "argsort + bincount": plain,
    }


def aux_topk_runs(case: Case) -> dict[str, Run]:
    t = leaves(case)
    dead = torch.rand(case.F, generator=torch.Generator().manual_seed(1)) < 0.05
    weights = (t["W_enc"], t["b_enc"], t["W_dec"])
    x = t["x"]

    def ours(impl: str) -> Tensor:
        return backward(aux_topk(x, x, dead, *weights, b_pre=t["b_dec"], impl=impl), *weights)

    return {"eager": lambda: ours("eager"), "reference": lambda: ours("reference")}


def row_adam_runs(case: Case) -> dict[str, Run]:
    weight, g = torch.randn(case.F, case.D), torch.randn(case.F, case.D)
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    ours, plain = weight.clone(), weight.clone().requires_grad_()
    plain.grad = g
    optimizer = torch.optim.Adam([plain], lr=1e-3, fused=True)
    steps = iter(range(1, 10**9))

    def by_rows() -> Tensor:
        row_adam(ours, [DenseGrad(g)], *moments, step=next(steps), lr=1e-3)
        return ours.sum()

    def fused() -> Tensor:
        optimizer.step()
        return plain.detach().sum()

    return {"eager": by_rows, "torch.optim.Adam(fused)": fused}


OPS: dict[str, Callable[[Case], dict[str, Run]]] = {
    "topk_encode": topk_encode_runs,
    "topk_encode fwd+bwd": topk_encode_backward_runs,
    "sparse_decode": sparse_decode_runs,
    "mse_l1_loss fwd+bwd": mse_l1_loss_runs,
    "group_by_latent": group_by_latent_runs,
    "aux_topk 5% dead fwd+bwd": aux_topk_runs,
    "row_adam": row_adam_runs,
}


def ceilings(case: Case) -> dict[str, float]:
    """GFLOP/s of the fp32 GEMM of the case and GB/s of a copy."""
    t = leaves(case)
    x, W = t["x"], t["W_enc"].detach()
    out, source = torch.empty(case.B, case.F), torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleaved(
        {"gemm": lambda: torch.mm(x, W, out=out), "copy": lambda: target.copy_(source)}, 5
    )
    flop, moved = 2 * case.B * case.D * case.F, 2 * source.numel()
    return {
        "gemm_gflops": round(flop / min(seconds["gemm"]) / 1e9, 1),
        "copy_gbps": round(moved / min(seconds["copy"]) / 1e9, 1),
    }


def times(name: str, case: Case, repeats: int) -> list[dict[str, Any]]:
    """A row a provider; one that fails parity is shown, not timed."""
    runs = OPS[name](case)
    values = {provider: run().detach().double() for provider, run in runs.items()}
    anchor = values["eager"]
    failing = []
    for provider, value in values.items():
        error = float((value - anchor).abs().max() / anchor.abs().max().clamp_min(1e-12))
        if error > PARITY:
            failing.append(provider)
            print(f"{name}: {provider} fails parity (relative error {error:.1e}); not timed")
    seconds = interleaved({p: r for p, r in runs.items() if p not in failing}, repeats)
    ours = quantiles(seconds["eager"])["ms_p50"]
    shape = {"case": case.name, "B": case.B, "D": case.D, "F": case.F, "K": case.K}
    return [
        {"bench": "ops", "op": name, **shape, "provider": provider, **quantiles(s)}
        | {"over_ours": round(quantiles(s)["ms_p50"] / ours, 2)}
        for provider, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--case", choices=CASES, default="smollm2-135m-16k")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    case = CASES[args.case]
    limits = ceilings(case)
    print(f"{case.name}: B={case.B} D={case.D} F={case.F} K={case.K}; ceilings {limits}")
    found = []
    for name in args.op:
        for row in times(name, case, args.repeats):
            found.append(row | limits)
            print(
                f"{row['op']:26}{row['provider']:26}{row['ms_p50']:10.2f} ms"
                f"{row['over_ours']:8.2f} x ours"
            )
    if args.save:
        print(f"appended to {append(args.save, found)}")


if __name__ == "__main__":
    main()
