"""One whole training step, Adam and counters included, against its rivals in one process.

python -m bench.train_step                              # smollm2-135m-16k, every provider
python -m bench.train_step --case smollm2-135m-65k --dead 0.05
python -m bench.train_step --peers                      # other libraries, with memory
python -m bench.train_step --memory                     # peak temporary memory
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case, Start, rows
from bench.measure import interleaved, peak_extra_bytes, quantiles
from bench.providers import PEERS, PROVIDERS, Step, fastsae_step
from bench.record import append
from fastsae_kernels import release_scratch, workspace

MEMORY_WORKSPACE = 32 << 20
FIRST_STEP, THIRD_STEP = 1e-4, 1e-2  # relative difference of the loss


def times(
    case: Case, providers: list[str], repeats: int, dead: float, *, peaks: bool = False
) -> list[dict[str, Any]]:
    """Milliseconds of each provider, of the plain encoder GEMM, and their ratios.

    With `peaks` also what a step needs at its peak beyond what is held between steps, MiB.
    """
    start, x = Start.random(case, dead), rows(case)
    steps: dict[str, Step] = {name: PROVIDERS[name](start) for name in providers}
    # The third loss has been through two updates, so a wrong gradient shows; rivals that treat
    # the decoder otherwise (sparsify projects its gradient) differ there in the third digit.
    losses = {name: [step(x) for _ in range(3)] for name, step in steps.items()}
    anchor = losses[providers[0]]
    failing = [
        name
        for name, found in losses.items()
        if abs(found[0] / anchor[0] - 1) > FIRST_STEP or abs(found[2] / anchor[2] - 1) > THIRD_STEP
    ]
    for name in failing:
        print(f"{name}: parity failed, mse {losses[name]} against {anchor}; not timed")
    runs: dict[str, Callable[[], object]] = {
        name: partial(step, x) for name, step in steps.items() if name not in failing
    }
    row_major = start.W_enc.contiguous()
    out = torch.empty(case.B, case.F)
    runs["gemm"] = lambda: torch.mm(x, start.W_enc)
    runs["gemm-row-major"] = lambda: torch.mm(x, row_major)
    runs["gemm-out"] = lambda: torch.mm(x, start.W_enc, out=out)
    seconds = interleaved(runs, repeats)
    medians = {name: quantiles(s)["ms_p50"] for name, s in seconds.items()}
    gemm = min(medians["gemm"], medians["gemm-row-major"])
    memory = {
        name: {"peak_mib": round(peak_extra_bytes(runs[name]) / 2**20)} if peaks else {}
        for name in runs
    }
    shape = {"B": case.B, "D": case.D, "F": case.F, "K": case.K}
    return [
        {
            "bench": "train_step",
            "case": case.name,
            **shape,
            "dead": dead,
            "provider": name,
            **quantiles(s),
            "over_gemm": round(medians[name] / gemm, 3),
            "over_fastsae": round(medians[name] / medians[providers[0]], 3),
            **memory[name],
        }
        for name, s in seconds.items()
    ]


def memory(case: Case) -> list[dict[str, Any]]:
    """Peak bytes of a step beyond parameters, moments and three [B, D] fp32 tensors."""
    x = rows(case)
    with workspace(MEMORY_WORKSPACE):
        step = fastsae_step(Start.random(case, 0.0))
        step(x)
        # What else the process touches for the first time can only add to a measurement.
        peak = min(_peak(step, x) for _ in range(3)) - 3 * x.numel() * 4
    dense = 4 * case.B * case.F
    allowed = MEMORY_WORKSPACE + 0.02 * dense
    return [
        {
            "bench": "train_step_memory",
            "case": case.name,
            "provider": "fastsae",
            "workspace_mib": MEMORY_WORKSPACE >> 20,
            "peak_temporary_mib": round(peak / 2**20, 1),
            "allowed_mib": round(allowed / 2**20, 1),
            "dense_latents_mib": round(dense / 2**20, 1),
        }
    ]


def _peak(step: Step, x: Tensor) -> int:
    release_scratch()
    return peak_extra_bytes(partial(step, x))


def summary(ms: dict[str, float]) -> str:
    """How often each peer's step holds ours, and SAELens's the accelerated one."""
    ratios = [f"{ms[p] / ms['fastsae']:.2f} x over {p}" for p in PEERS[1:] if p in ms]
    said = f"fastsae: {', '.join(ratios)}"
    if {"sae-lens", "sae-lens-accelerated"} <= ms.keys():
        said += f"; accelerated SAELens: {ms['sae-lens'] / ms['sae-lens-accelerated']:.2f} x"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="smollm2-135m-16k")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--peers", action="store_true", help=f"{', '.join(PEERS)}, and memory")
    parser.add_argument("--batch-size", type=int, help="rows B, where not the case's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents taken for dead")
    parser.add_argument("--memory", action="store_true", help="peak temporary memory instead")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl")
    args = parser.parse_args()
    case = CASES[args.case]
    case = replace(case, B=args.batch_size or case.B)
    providers = PEERS if args.peers else args.providers
    if args.memory:
        found = memory(case)
    else:
        found = times(case, providers, args.repeats, args.dead, peaks=args.peers)
    shown = ["provider", "ms_p20", "ms_p50", "ms_p80", "over_gemm", "over_fastsae"]
    shown += ["peak_mib"] if args.peers else []
    columns = list(found[0])[2:] if args.memory else shown
    print(f"{case.name}: B={case.B} D={case.D} F={case.F} K={case.K}, dead {args.dead:.0%}")
    print("  ".join(f"{c:>20}" for c in columns))
    for row in found:
        print("  ".join(f"{row[c]!s:>20}" for c in columns))
    if args.peers:
        print(summary({row["provider"]: row["ms_p50"] for row in found}))
    if args.save:
        print(f"appended to {append(args.save, found)}")


if __name__ == "__main__":
    main()
