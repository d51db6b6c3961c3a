"""Compile every Triton kernel ahead of time, for GPUs that need not be there.

    python -m bench.aot                              # all configurations, four targets
    python -m bench.aot --default --target sm_90     # what the ops run unless told otherwise
    python -m bench.aot --target sm_90 --markdown
    python -m bench.aot --detail sm_90 --write docs/kernels.md

Prints registers and stack of a thread (a stack means spilled registers), local and shared memory,
machine instructions, how many of them follow the last matrix product, and seconds to compile.
Of a HIP target it prints what LLVM's assembly states: vector registers, spills, shared memory.
`--write` replaces what a page has between `<!-- aot:begin -->` and `<!-- aot:end -->`: a line a
target, and a line a kernel of the targets of `--detail`.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastsae_kernels
from bench.pages import between_markers
from fastsae_kernels._triton import Spec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program may have: with more a kernel compiles and does not launch."""
MATRIX_PRODUCT = re.compile(r"\b(?:HGMMA|HMMA|IMMA|UTC\w*MMA|v_mfma_\w+)\b")
LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Compiled:
    """What a target's compiler made of a kernel; `error` instead if it refused."""

    kernel: str
    target: str
    triton: str
    seconds: float
    default: bool = False
    """Whether an op runs it unless told otherwise."""
    registers: int | None = None
    stack: int | None = None
    """Bytes a thread; on HIP the number of spilled vector registers."""
    local: int | None = None
    shared: int | None = None
    instructions: int | None = None
    after_product: int | None = None
    local_accesses: int | None = None
    error: str | None = None

    def fits(self) -> bool:
        return self.shared is None or self.shared <= SHARED_BYTES[self.target]

    def spills(self) -> bool:
        return bool(self.stack or self.local)


def all_specs() -> Iterator[Spec]:
    """Those of every `kernel.py` of the package, by folder."""
    for path in sorted(Path(fastsae_kernels.__path__[0]).glob("*/kernel.py")):
        yield from importlib.import_module(f"fastsae_kernels.{path.parent.name}.kernel").specs()


def runs_on(spec: Spec, target: str) -> bool:
    """The ops hand a kernel tensor descriptors from sm_90 on, and pointers elsewhere."""
    has_descriptors = any(t.startswith("tensordesc") for t in spec.signature.values())
    return not has_descriptors or target in ("sm_90", "sm_100")


def one_of_each(specs: Iterable[Spec]) -> list[Spec]:
    """The first configuration of each kernel, operand type and way of loading."""
    first: dict[Any, Spec] = {}
    for spec in specs:
        types = " ".join(spec.signature.values())
        key = spec.kernel.__name__, "bf16" in types, "fp16" in types, "tensordesc" in types
        first.setdefault(key, spec)
    return list(first.values())


def source_of(spec: Spec) -> ASTSource:
    """What a launch would compile: the constants, and 16-byte alignment where it would be seen.

    Raises:
        ValueError: an argument of the kernel is neither in the signature nor a constant, or both.
    """
    names = spec.kernel.arg_names
    if sorted([*spec.signature, *spec.constants]) != sorted(names):
        wrong = set(names).symmetric_difference([*spec.signature, *spec.constants])
        wrong |= set(spec.signature) & set(spec.constants)
        raise ValueError(f"{spec.name}: signature and constants must share {names}, got {wrong}")
    plain = {p.name for p in spec.kernel.params if not p.do_not_specialize}
    aligned = {
        name
        for name, kind in spec.signature.items()
        if name in plain and (kind.startswith("*") or kind in ("i32", "i64"))
    }
    return ASTSource(
        spec.kernel,
        {name: spec.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in spec.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def compile_spec(spec: Spec, target: str, disassemble: bool = True) -> Compiled:
    options: dict[str, int] = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.max_registers is not None and TARGETS[target].backend == "cuda":
        options["maxnreg"] = spec.max_registers
    started = time.perf_counter()
    found: dict[str, Any] = {"kernel": spec.name, "target": target, "default": spec.default}
    found["triton"] = triton.__version__
    try:
        made = triton.compile(source_of(spec), target=TARGETS[target], options=options)
    except Exception as failure:
        seconds = round(time.perf_counter() - started, 2)
        error = "".join(traceback.format_exception_only(failure)).strip()
        return Compiled(**found, seconds=seconds, error=error[-2000:])
    found["seconds"] = round(time.perf_counter() - started, 2)
    found["shared"] = made.metadata.shared
    if TARGETS[target].backend == "hip":
        return Compiled(**found, **_hip_resources(made.asm["amdgcn"]))
    return Compiled(**found, **_cuda_resources(made.asm["cubin"], disassemble))


def _cuda_resources(cubin: bytes, disassemble: bool) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "-res-usage", file.name)
        listing = _output(tool, "-sass", file.name) if disassemble else ""
    sizes = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if sizes is None:
        raise RuntimeError(f"cuobjdump must print REG, STACK and LOCAL, got {usage!r}")
    registers, stack, local = map(int, sizes.groups())
    resources: dict[str, Any] = {"registers": registers, "stack": stack, "local": local}
    if disassemble:
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)
        resources |= _counts(lines)
        resources["local_accesses"] = sum(bool(LOCAL_ACCESS.search(line)) for line in lines)
    return resources


def _hip_resources(assembly: str) -> dict[str, Any]:
    stated = {key: int(value) for key, value in re.findall(r"; (\w+): (\d+)\s*$", assembly, re.M)}
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    lines = re.findall(r"^\s+(?:[sv]|ds|buffer|global|scratch|flat)_\w.*$", assembly, re.M)
    return {
        "registers": stated.get("NumVgprs", 0),
        "stack": int(spilled.group(1)) if spilled else 0,
        "local": stated.get("ScratchSize", 0),
        **_counts(lines),
    }


def _counts(lines: list[str]) -> dict[str, int]:
    products = [i for i, line in enumerate(lines) if MATRIX_PRODUCT.search(line)]
    after = {"after_product": len(lines) - 1 - products[-1]} if products else {}
    return {"instructions": len(lines), **after}


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def markdown(rows: list[Compiled], detail: Iterable[str] = TARGETS) -> str:
    """A line a target; then a table of each target of `detail`, in the order of `rows`."""
    lines = [*summary(rows), ""]
    heads = ("kernel", "registers", "stack", "shared", "instructions", "after the last product")
    for target in dict.fromkeys(row.target for row in rows if row.target in detail):
        mine = [row for row in rows if row.target == target]
        lines += [f"**{target}**, Triton {mine[0].triton}", ""]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in mine:
            cells = [row.registers, row.stack, row.shared, row.instructions, row.after_product]
            shown = [row.error.splitlines()[-1], *[""] * 4] if row.error else map(_shown, cells)
            lines.append("| " + " | ".join([row.kernel, *shown]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def summary(rows: list[Compiled]) -> list[str]:
    """Numbers of configurations, in brackets of defaults, and the largest figures of a target."""
    heads = ("target", "configurations", "refused", "too much shared memory", "spill registers")
    heads += ("most registers", "most shared bytes")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for target in dict.fromkeys(row.target for row in rows):
        mine = [row for row in rows if row.target == target]
        counted = [
            _count(mine),
            _count(row for row in mine if row.error),
            _count(row for row in mine if not row.fits()),
            _count(row for row in mine if row.spills()),
            str(max(row.registers or 0 for row in mine)),
            str(max(row.shared or 0 for row in mine)),
        ]
        lines.append("| " + " | ".join([target, *counted]) + " |")
    return lines


def _count(rows: Iterable[Compiled]) -> str:
    rows = list(rows)
    return f"{len(rows)} ({sum(row.default for row in rows)})"


def line_of(row: Compiled) -> str:
    if row.error:
        return f"{row.target:7} {row.kernel:62} FAILS {row.error}"
    return (
        f"{row.target:7} {row.kernel:62} regs {row.registers:4} stack {row.stack:4} local "
        f"{row.local:4} shared {row.shared:7} instructions {_shown(row.instructions):>5} "
        f"after the product {_shown(row.after_product):>5} {row.seconds:6.2f} s"
        f"{'' if row.fits() else '  TOO MUCH SHARED MEMORY'}"
    )


def _shown(count: int | None) -> str:
    return "-" if count is None else str(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name matches this pattern")
    parser.add_argument("--default", action="store_true", help="only default configurations")
    parser.add_argument(
        "--one-of-each",
        choices=TARGETS,
        nargs="+",
        default=[],
        help="targets of which one configuration of each kernel is enough",
    )
    parser.add_argument("--no-disassembly", action="store_true", help="count no instructions")
    parser.add_argument("--cached", action="store_true", help="take what Triton's cache has")
    parser.add_argument("--json", action="store_true", help="print a JSON object a kernel")
    parser.add_argument("--markdown", action="store_true", help="print tables")
    parser.add_argument(
        "--detail", choices=TARGETS, nargs="*", default=list(TARGETS), help="targets with a table"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET must be unset: interpreted kernels cannot be compiled")
    specs = [s for s in all_specs() if re.search(args.kernel, s.name)]
    specs = [s for s in specs if s.default or not args.default]
    rows: list[Compiled] = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.cached:
            os.environ["TRITON_CACHE_DIR"] = folder
        for target in args.target:
            chosen = [s for s in specs if runs_on(s, target)]
            for spec in one_of_each(chosen) if target in args.one_of_each else chosen:
                rows.append(compile_spec(spec, target, not args.no_disassembly))
                if args.json:
                    print(json.dumps(asdict(rows[-1])), flush=True)
                elif not args.markdown:
                    print(line_of(rows[-1]), flush=True)
    if args.markdown:
        print(markdown(rows, args.detail))
    if args.write:
        text = markdown(rows, args.detail)
        args.write.write_text(between_markers(args.write.read_text(), "aot", text))
    sys.exit(any(row.error for row in rows))


if __name__ == "__main__":
    main()
