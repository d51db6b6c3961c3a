"""Everything that needs a GPU, in one call of less than eight minutes.

    python -m bench.gpu_check                     # rows to bench/results/gpu.jsonl
    python -m bench.gpu_check --out rows.jsonl    # rows to that file
    python -m bench.gpu_check --quick             # in miniature; without a GPU always so

Parts: `tests` (the kernels' own, by pytest, a row for each file), `parity` (real sizes against
fp64, offsets beyond 2^31), `training` (same bits twice, memory, one graph, losses on real rows),
`encode`, `ops`, `steps` (times, with ceilings, rivals and the other libraries that are installed
measured in the same process). The first three share the GPU; what is timed has it to itself. Each
part is a process of its own: one that fails, or takes longer than its budget, is reported and the
next one goes on. Exit status 0 if nothing failed.

Needs torch, triton, numpy, safetensors and pytest; where nothing is installed, start it with
PYTHONPATH=kernels from the root of the repository. The variable COMMIT, if set, names the commit in
the rows, where the tree is a copy without its history.
"""

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import parity, speed, training
from bench.gpu.harness import DRY, FULL, QUICK, Report, Row, Scale, free_memory
from bench.record import RESULTS, environment

ROOT = Path(__file__).parent.parent
LOCAL = {"bench", "fastsae", "fastsae_kernels", *(p.stem for p in (ROOT / "tests").glob("*.py"))}


@dataclass(frozen=True)
class Part:
    """Functions that run one after another in one process, within `budget` seconds."""

    budget: float
    run: tuple[Callable[[Scale, Report], None], ...]
    timed: bool = True


PARTS = {
    "parity": Part(
        140,
        (
            parity.encode,
            parity.free_slots,
            parity.ragged_encodes,
            parity.dead_latents,
            parity.sparse_ops,
            parity.encode_real_rows,
            parity.far_weights,
            parity.far_groups,
            parity.far_rows,
        ),
        timed=False,
    ),
    "training": Part(
        140,
        (
            training.determinism,
            training.memory,
            training.real_training,
            training.one_graph,
            training.every_variant,
        ),
        timed=False,
    ),
    "encode": Part(85, (speed.encode,)),
    "steps": Part(110, (speed.steps, speed.peers)),
    "ops": Part(80, (speed.every_op,)),
}
TESTS_BUDGET = 150.0
GRACE = 15.0
"""Seconds after its budget until a part is ended: not all that it does looks at the clock."""
# The plugin that checks shapes may be absent, and warnings of other versions are no failure.
PYTEST_OPTIONS = [
    *("-o", "addopts=", "-o", "filterwarnings=default", "--import-mode=importlib"),
    *("-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", "-m", "not slow"),
    "--disable-warnings",
]


def run_part(name: str, scale: Scale, out: Path | None) -> list[str]:
    """Run a part in this process; the names of what failed."""
    part = PARTS[name]
    report = Report(name, part.budget, out)
    for function in part.run:
        started = time.monotonic()
        try:
            function(scale, report)
        except Exception:
            report.note(traceback.format_exc(limit=-6))
            report.check(f"{function.__name__} runs to its end", False)
        free_memory()
        report.note(f"{function.__name__} took {time.monotonic() - started:.1f} s")
    return report.failures


def kernel_tests() -> tuple[list[Path], list[str]]:
    """Test files that run kernels, and why others of them cannot be run here."""
    chosen, left_out = [], []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        names = _imports(path)
        about_kernels = "fastsae_kernels" in names or path.stem in ("test_saes", "test_trainer")
        for helper in names & LOCAL:
            if (path.parent / f"{helper}.py").exists():
                names |= _imports(path.parent / f"{helper}.py")
        needed = names - LOCAL | ({"jaxtyping"} if "fastsae" in names else set())
        absent = [n for n in needed if importlib.util.find_spec(n) is None]
        if about_kernels and absent:
            left_out.append(f"{path.name} left out: {', '.join(sorted(absent))} absent")
        elif about_kernels:
            chosen.append(path)
    return chosen, left_out


def _imports(path: Path) -> set[str]:
    """Top-level packages that a file imports outside its functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@dataclass
class Child:
    """A process with a time limit, whose output goes to a file until it ends."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ends: float

    @staticmethod
    def start(name: str, command: list[str], seconds: float, folder: Path) -> "Child":
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # Deterministic cuBLAS, for tests that ask for it; few threads, since many run side by side.
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "4"}
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        return Child(name, process, log, time.monotonic() + seconds)

    def wait(self) -> str | None:
        """Print what it printed; why it failed, or None."""
        try:
            code = self.process.wait(max(0.0, self.ends - time.monotonic()))
            why = None if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            why = "out of time"
        print(self.log.read_text(errors="replace").rstrip(), flush=True)
        return why


def start_tests(folder: Path) -> list[Child]:
    chosen, left_out = kernel_tests()
    for line in left_out:
        print(line)
    pytest = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS]
    return [
        Child.start(
            path.stem,
            [*pytest, f"--junitxml={_outcome_of(path.stem, folder)}", str(path)],
            TESTS_BUDGET,
            folder,
        )
        for path in chosen
    ]


def _outcome_of(name: str, folder: Path) -> Path:
    return folder / f"{name}.xml"


def tests_counted(outcome: Path) -> dict[str, float]:
    """Numbers of tests and seconds, as pytest wrote them; nothing where it did not come to that."""
    suite = ElementTree.parse(outcome).find("testsuite") if outcome.exists() else None
    if suite is None:
        return {}
    names = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (int(suite.attrib[name]) for name in names)
    failed = failures + errors
    return {
        "tests_passed": tests - failed - skipped,
        "tests_failed": failed,
        "tests_skipped": skipped,
        "seconds": float(suite.attrib["time"]),
    }


def start_part(name: str, quick: bool, out: Path, folder: Path) -> Child:
    command = [sys.executable, "-m", "bench.gpu_check", "--part", name, "--out", str(out)]
    return Child.start(name, command + ["--quick"] * quick, PARTS[name].budget + GRACE, folder)


def run_all(names: list[str], quick: bool, out: Path) -> list[str]:
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        side_by_side = [n for n in names if n in PARTS and not PARTS[n].timed]
        parts = [start_part(name, quick, out, folder) for name in side_by_side]
        tests = start_tests(folder) if "tests" in names else []
        report = Report("tests", TESTS_BUDGET, out)
        children = [*parts, *tests]
        try:
            for child in parts:
                failures += _failure(child)
            for child in tests:
                failure = _failure(child)
                counted = tests_counted(_outcome_of(child.name, folder))
                report.check(f"tests of {child.name}", not failure, **counted)
                failures += failure
            for name in names:
                if name in PARTS and PARTS[name].timed:
                    children.append(start_part(name, quick, out, folder))
                    failures += _failure(children[-1])
        finally:
            for child in children:
                child.process.kill()  # nothing to one that has ended
    return failures


def _failure(child: Child) -> list[str]:
    why = child.wait()
    return [] if why is None else [f"{child.name}: {why}"]


def summary(rows: list[Row]) -> str:
    """The figures that the targets are about, and every check that failed."""
    checks = [r for r in rows if r["bench"] == "gpu_check"]
    lines = [f"{sum(r['passed'] for r in checks)} of {len(checks)} checks passed"]
    lines += [f"  FAILED {r['check']}" for r in checks if not r["passed"]]
    for row in rows:
        if "failed" in row:
            continue
        if row["bench"] == "gpu_encode":
            line = f"  encode {row['case']:24}{row['provider']:34}{row['ms']:9.3f} ms"
            lines.append(f"{line}{row['over_cublas']:7.2f} x cuBLAS")
        elif row["bench"] == "gpu_step":
            line = f"  step   {row['case']:24}{row['provider']:34}{row['ms']:9.3f} ms"
            lines.append(f"{line}{row['over_floor']:7.2f} x floor")
        elif row["bench"] == "ops" and row["provider"] == "triton" and "roofline" in row:
            line = f"  op     {row['case']:24}{row['op']:34}{row['ms_p50']:9.3f} ms"
            lines.append(f"{line}{row['roofline']:7.1%} of the roofline")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    choices = ["tests", *PARTS]
    parser.add_argument("--parts", choices=choices, nargs="+", default=choices)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out: Path = args.out.absolute()
    scale = QUICK if args.quick or DRY else FULL
    if args.part:
        sys.exit(bool(run_part(args.part, scale, out)))
    started, before = time.monotonic(), _lines(out)
    print(json.dumps(environment()), flush=True)
    if DRY:
        print("no GPU: everything in miniature in Triton's interpreter, nothing timed or written")
        failures = [f for name in args.parts if name in PARTS for f in run_part(name, scale, out)]
    else:
        failures = run_all(args.parts, args.quick, out)
        print(f"\n{summary([json.loads(line) for line in _lines(out)[len(before) :]])}")
    print(f"{time.monotonic() - started:.0f} s; " + ("; ".join(failures) or "nothing failed"))
    sys.exit(bool(failures))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
