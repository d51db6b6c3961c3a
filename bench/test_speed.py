"""The same cases under pytest-benchmark, for comparison with a saved run.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-autosave            # keep this run
    pytest bench --benchmark-only --benchmark-compare             # beside the last one kept
    pytest bench --benchmark-only --case smollm2-135m-16k --benchmark-json rows.json

Nothing is asserted of a time.
"""

from functools import cache
from typing import Any

import pytest
import torch

from bench.cases import Start, batch, find_case
from bench.providers import PROVIDERS, find_provider
from bench.rivals import OPS, Inputs
from fastsae_kernels._dispatch import interpreted

pytest.importorskip("pytest_benchmark")
if interpreted():
    pytest.skip(
        "TRITON_INTERPRET is set: interpreted kernels are not timed", allow_module_level=True
    )
PROVIDERS_TIMED = [name for name in PROVIDERS if name != "reference"]


@cache
def inputs_of(case_name: str) -> Inputs:
    return Inputs(find_case(case_name), "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provider", PROVIDERS_TIMED)
def test_step(benchmark: Any, case_name: str, provider: str) -> None:
    missing = find_provider(provider).missing()
    if missing is not None:
        pytest.skip(f"not installed: {missing}")
    case = find_case(case_name)
    step, x = find_provider(provider).build(Start.random(case)), batch(case)
    benchmark.group = f"one training step, {case_name}"
    benchmark.extra_info |= {"case": case_name, "provider": provider}
    benchmark.pedantic(step, (x,), rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, case_name: str, op: str) -> None:
    run = next(iter(OPS[op](inputs_of(case_name)).values()))
    benchmark.group = f"ops, {case_name}"
    benchmark.extra_info |= {"case": case_name, "op": op}

    def wait() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(wait, rounds=5, warmup_rounds=2)
