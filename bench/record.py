"""Result rows: one JSON object a line, with the hardware and versions that made it."""

import datetime
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "sae-lens", "eai-sparsify", "dictionary-learning")


def environment() -> dict[str, Any]:
    return {
        "device": _device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **(_gpu() if torch.cuda.is_available() else {}),
        **{name: _version(name) for name in PACKAGES},
        **_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def append(file: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Add rows, each with the environment, to `bench/results/<file>.jsonl`, or to that path."""
    path = file if isinstance(file, Path) else RESULTS / f"{file}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    here = environment()
    with path.open("a") as out:
        for row in rows:
            out.write(json.dumps(row | here) + "\n")
    return path


def _commit() -> dict[str, Any]:
    # A machine that was handed a copy of the tree may have no git, or another history.
    if "COMMIT" in os.environ:
        return {"commit": os.environ["COMMIT"], "dirty": False}
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": _git("rev-parse", "--short", "HEAD") or "unknown", "dirty": dirty}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    """The driver, and the clocks at the moment and at most."""
    names = {"driver": "driver_version", "sm_clock": "clocks.sm", "most_sm_clock": "clocks.max.sm"}
    names |= {"memory_clock": "clocks.mem"}
    query = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*query, "-i", "0"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, done.stdout.strip().split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
