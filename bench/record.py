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


def environment(device: str | None = None) -> dict[str, Any]:
    """Of rows measured on "cpu" or "cuda"; None: on the GPU, where there is one."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        **(_gpu() if on_gpu else {}),
        **{name: _version(name) for name in PACKAGES},
        **_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def append(file: str | Path, rows: list[dict[str, Any]], device: str | None = None) -> Path:
    """Add rows, each with `environment(device)`, to `bench/results/<file>.jsonl` or that path."""
    path = file if isinstance(file, Path) else RESULTS / f"{file}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    here = environment(device)
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


def _processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    """The driver, the clocks at the moment and at most, and what holds them down."""
    names = {"driver": "driver_version", "sm_clock": "clocks.sm", "most_sm_clock": "clocks.max.sm"}
    names |= {"memory_clock": "clocks.mem"}
    # Older drivers name them otherwise.
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active", None):
        asked = names if reasons is None else names | {"throttle_reasons": reasons}
        query = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                [*query, "-i", _gpu_id()], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return dict(zip(asked, done.stdout.strip().split(", "), strict=False))
    return {}


def _gpu_id() -> str:
    """Of the current device to nvidia-smi, which knows nothing of CUDA_VISIBLE_DEVICES."""
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return str(index) if uuid is None else f"GPU-{uuid}"


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
