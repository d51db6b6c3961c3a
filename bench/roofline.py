"""What a training step must cost: its flop and bytes, at the ceilings measured in the same run."""

from dataclasses import dataclass

from bench.cases import Case


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
