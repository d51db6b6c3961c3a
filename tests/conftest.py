import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # Read when triton is first imported: the kernels then run on the CPU, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder by its name: the first test worker that asks fills it, all others read it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return of


@pytest.fixture
def mount(tmp_path):
    """Mounts a disk in memory, or again with other options, where that is allowed."""
    folder = tmp_path / "disk"
    mounted = False

    def of(options: str) -> Path:
        nonlocal mounted
        folder.mkdir(exist_ok=True)
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("mounting a disk needs root")
        return folder

    yield of
    if mounted:
        # Lazily: a file may still be mapped.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def made_where_kernels_run():
    """Tensors are made on the GPU, where there is one, unless told otherwise."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture(autouse=True)
def _same_every_time():
    """One seed a test, and NaN in every uninitialised tensor so that an unwritten output fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_type_checker():
    """The package as a user has it: the type checker comes before our own rule on a `Literal`."""
    import jaxtyping  # the kernels' own tests run without it

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
