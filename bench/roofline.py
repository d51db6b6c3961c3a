"""What an op or a step must cost: its flop and bytes, at the ceilings measured in the same run."""

from dataclasses import dataclass

import torch

from bench.cases import Case
from bench.measure import interleaved

DEAD = 0.05
"""Share of the latents that `aux_topk` is given for dead."""


@dataclass(frozen=True)
class Work:
    flop: float
    n_bytes: float
    """Read or written, each once."""

    def floor_ms(self, ceilings: dict[str, float]) -> float:
        """At `gemm_gflops` and `copy_gbps`, one after the other."""
        return (
            self.flop / ceilings["gemm_gflops"] / 1e6 + self.n_bytes / ceilings["copy_gbps"] / 1e6
        )

    def row(self, ms: float, ceilings: dict[str, float]) -> dict[str, float]:
        """What a result row says of it, given the time measured."""
        floor = self.floor_ms(ceilings)
        return {
            "flop": self.flop,
            "bytes": self.n_bytes,
            "floor_ms": round(floor, 3),
            "roofline": round(floor / ms, 3),
        }


def step_work(case: Case, *, half: bool) -> Work:
    """One encoder product, one gather, and the optimizer's pass over both dictionaries.

    2 B D F flop. Weight and moments are read and written in fp32, 24 bytes a parameter, and with
    `half` a copy of 2 bytes is written; B K D elements are gathered.
    """
    B, D, F, K = case.B, case.D, case.F, case.K
    parameter, element = (26, 2) if half else (24, 4)
    return Work(2.0 * B * D * F, float(parameter * 2 * F * D + element * B * K * D))


def op_work(name: str, case: Case, element: int, touched: int | None = None) -> Work | None:
    """What no implementation can avoid, every input read once and every output written once.

    `element` is the size of rows and copies; gradients, errors, masters and moments are fp32.

    `touched` is how many latents the code holds; unknown, as many as it can. All flop count at the
    rate of the encoder's product. `aux_topk`: scores of the dead latents, then decode, its gradient
    and those of both weights over k_aux of them a row, and two dense gradients written.
    `relu_l1_loss`: five dense products, since half of its latents are active.
    """
    B, D, F, K = case.B, case.D, case.F, case.K
    product, dictionary, rows = 2.0 * B * D * F, 4.0 * F * D, float(B * D)
    touched = min(F, B * K) if touched is None else touched
    table = float(element * D * touched)  # rows of W_dec that are read at all
    dead = DEAD * F
    picked = dead + 4 * min(D // 2, dead)
    found = {
        "topk_encode": (product, 0.0),
        "topk_encode fwd+bwd": (product, element * rows + dictionary),
        "batch_topk_encode": (product, 0.0),
        "threshold_encode": (product, 0.0),
        "jumprelu_encode fwd+bwd": (product, element * rows + dictionary),
        "sparse_decode": (0.0, table + 4 * rows),
        "mse_l1_loss fwd": (0.0, table + (4 + element) * rows),
        "mse_l1_loss fwd+bwd": (0.0, table + (8 + element) * rows + dictionary),
        "pair_dots": (0.0, table + 4 * rows),
        "group_by_latent": (0.0, 16.0 * B * K + 4 * F),
        "segment_sum": (0.0, 4 * rows + dictionary),
        "aux_topk 5% dead fwd+bwd": (2 * rows * picked, 8 * rows + (2 + 2 * DEAD) * dictionary),
        "relu_l1_loss fwd+bwd": (5 * product, element * rows + 4 * dictionary),
        "row_adam": (0.0, 7 * dictionary),
        "row_adam from pairs": (0.0, 4 * rows + 6.5 * dictionary),
        "lazy_row_adam from pairs": (0.0, 4 * rows + 24.0 * D * touched),
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
        *((7, 3) if device == "cuda" else (5, 1)),
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
