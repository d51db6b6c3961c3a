"""Every kernel compiled ahead of time, without a GPU, by two versions of Triton."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import aot  # noqa: E402
from bench.pages import between_markers  # noqa: E402

ROOT = Path(__file__).parent.parent
OLD = "3.6.0"
OLD_TRITON = Path(sys.prefix) / f"triton-{OLD}"
OTHERS = ["sm_80", "sm_100", "gfx942"]
EVERYWHERE = ["--target", "sm_90", *OTHERS]


def start(triton, *arguments):
    """A process that compiles: kernels that were imported to be interpreted cannot be."""
    folders = [*([str(OLD_TRITON)] if triton == OLD else []), str(ROOT), str(ROOT / "kernels")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    # Whether a register is spilled is in the resource usage; disassembling takes as long again.
    flags = ["--default", "--cached", "--no-disassembly", "--json"]
    command = [sys.executable, "-m", "bench.aot", *flags, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def compiled_by_both(installed, old):
    """Rows of each Triton that is there, by its arguments; they run at the same time."""
    arguments = {"installed": installed, **({OLD: old} if OLD_TRITON.is_dir() else {})}
    running = {triton: start(triton, *given) for triton, given in arguments.items()}
    found = {}
    for triton, process in running.items():
        out, err = process.communicate()
        assert out, err
        found[triton] = [aot.Compiled(**json.loads(line)) for line in out.splitlines()]
    return found


@pytest.fixture(scope="module")
def compiled():
    of_the_old = ["--target", "sm_90", "--one-of-each", "sm_90"]
    return compiled_by_both([*EVERYWHERE, "--one-of-each", *OTHERS], of_the_old)


def check(found, triton, targets):
    if triton not in found:
        command = f"{sys.executable} -m pip install --target {OLD_TRITON} --no-deps triton=={OLD}"
        pytest.skip(f"Triton {OLD} is absent; {command}")
    rows = found[triton]
    assert {row.target for row in rows} == set(targets)
    assert triton == "installed" or {row.triton for row in rows} == {OLD}
    assert [f"{row.target}: {row.kernel}: {row.error}" for row in rows if row.error] == []
    nvidia = [row for row in rows if row.target != "gfx942"]
    assert [f"{row.target}: {row.kernel}" for row in nvidia if not row.fits()] == []
    hopper = [row for row in rows if row.target == "sm_90"]
    # Without a stack and without local memory there is nothing that LDL or STL could reach.
    assert [row.kernel for row in hopper if row.stack or row.local] == []


@pytest.mark.parametrize("triton", ["installed", OLD])
def test_default_kernels_compile_and_spill_nothing_on_sm_90(compiled, triton):
    """All of them for sm_90, one configuration of each kernel elsewhere and by the old Triton."""
    check(compiled, triton, aot.TARGETS if triton == "installed" else ["sm_90"])


@pytest.mark.slow
def test_default_kernels_compile_for_every_target():
    # Not on top: what imports the kernels is taken for a test that a GPU should run.
    from fastsae_kernels.topk.groups import HIP_TILE

    found = compiled_by_both(EVERYWHERE, EVERYWHERE)
    launched = "x".join(map(str, HIP_TILE))
    hip = [row for row in found["installed"] if row.target == "gfx942" and launched in row.kernel]
    assert hip and all(row.fits() for row in hip)
    for triton in ("installed", OLD):
        check(found, triton, aot.TARGETS)


def test_every_kernel_file_has_default_configurations():
    specs = list(aot.all_specs())
    assert len({spec.name for spec in specs}) == len(specs)
    kernels = {spec.kernel.__name__ for spec in specs}
    assert {spec.kernel.__name__ for spec in specs if spec.default} == kernels


def test_tables_go_between_the_markers_of_a_page():
    made = aot.Compiled("k[a]", "sm_90", OLD, 1.0, True, 40, 0, 0, 512, 300, 20, 0)
    refused = aot.Compiled("l", "sm_80", OLD, 1.0, error="a\nno such type")
    large, spilled = replace(made, shared=1 << 20), replace(made, stack=8, default=False)
    text = aot.markdown([made, large, spilled, refused])
    assert "| sm_90 | 3 (2) | 0 (0) | 1 (1) | 1 (0) | 40 | 1048576 |" in text
    assert "| sm_80 | 1 (0) | 1 (0) | 0 (0) | 0 (0) | 0 | 0 |" in text
    assert "| k[a] | 40 | 0 | 512 | 300 | 20 |" in text and "| l | no such type |" in text
    assert "| l | no such type |" not in aot.markdown([made, refused], ["sm_90"])
    page = "\n".join(["before", "<!-- aot:begin -->", "old", "<!-- aot:end -->", "after"])
    written = between_markers(page, "aot", text)
    assert written.startswith("before") and written.endswith("after")
    assert text in written and "old" not in written
    with pytest.raises(ValueError, match="aot:begin"):
        between_markers("no markers", "aot", text)
