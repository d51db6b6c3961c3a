"""The same cases under pytest-benchmark, for comparison with a saved run.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-autosave            # keep this run
    pytest bench --benchmark-only --benchmark-compare             # beside the last one kept
    pytest bench --benchmark-only --case smollm2-135m-16k --benchmark-json rows.json

Every step and op, ours and its rivals. One that fails parity fails, and is not timed; nothing is
asserted of a time.
"""

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import Case, Start, batch, find_case
from bench.ops import PARITY, op_differs
from bench.providers import PROVIDERS, find_provider
from bench.providers.base import Step
from bench.rivals import BY_NORM, NO_RIVAL, OPS, Inputs, Run
from bench.train_step import differs
from fastsae_kernels._dispatch import interpreted

pytest.importorskip("pytest_benchmark")
if interpreted():
    pytest.skip(
        "TRITON_INTERPRET is set: interpreted kernels are not timed", allow_module_level=True
    )
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = Case("smallest", 4, 16, 64, 2)
"""Of which the names of the rivals are asked before anything runs."""
OP_RUNS = [(op, name) for op, runs in OPS.items() for name in runs(Inputs(SMALLEST, DEVICE))]


def first_losses(step: Step, case_name: str) -> list[float]:
    x = batch(find_case(case_name)).to(DEVICE)
    return [step(x) for _ in range(3)]


@cache
def our_losses(case_name: str) -> list[float]:
    start = Start.random(find_case(case_name), device=DEVICE)
    return first_losses(PROVIDERS["fastsae"].build(start), case_name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark: Any, case_name: str, provider: str) -> None:
    missing = find_provider(provider).missing()
    if missing is not None:
        pytest.skip(f"not installed: {missing}")
    case = find_case(case_name)
    step = find_provider(provider).build(Start.random(case, device=DEVICE))
    said = differs(first_losses(step, case_name), our_losses(case_name), DEVICE)
    assert said is None, said
    benchmark.group = f"one training step, {case_name}"
    benchmark.extra_info |= {"case": case_name, "provider": provider}
    benchmark.pedantic(step, (batch(case).to(DEVICE),), rounds=5)


@cache
def inputs_of(case_name: str) -> Inputs:
    return Inputs(find_case(case_name), DEVICE)


@lru_cache(1)  # the rivals of one op follow one another, and hold what they read
def runs_of(case_name: str, op: str) -> tuple[dict[str, Run], Tensor]:
    """And what ours, the first, gives at its first run: some of them go on from where they are."""
    runs = OPS[op](inputs_of(case_name))
    return runs, next(iter(runs.values()))().detach().clone()


@pytest.mark.parametrize("op, provider", OP_RUNS)
def test_op(benchmark: Any, case_name: str, op: str, provider: str) -> None:
    runs, anchor = runs_of(case_name, op)
    run = runs[provider]
    if provider not in (next(iter(runs)), *NO_RIVAL):
        allowed = PARITY[inputs_of(case_name).dtype]
        said = op_differs(run().detach(), anchor, op in BY_NORM, allowed)
        assert said is None, said
    benchmark.group = f"{op}, {case_name}"
    benchmark.extra_info |= {"case": case_name, "op": op, "provider": provider}

    def wait() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(wait, rounds=5, warmup_rounds=2)
