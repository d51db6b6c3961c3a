"""The folder of a run from a language model: a new one, or the same run's."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from fastsae.files import write_json
from fastsae.training.run_config import LanguageModelRun

FREE_ON_RESUME = {
    *("out", "resume", "device", "eval_tokens", "checkpoints", "keep", "keep_every", "verify"),
    *("log_to", "project", "dp", "tp", "distribute", "exchange", "timeout_seconds", "model_ranks"),
}


def open_folder(run: LanguageModelRun) -> None:
    """Refuse another run's folder before the long work, and one that cannot be written to."""
    path = run.out / "run.json"
    write_json(run.out / ".writable", True)
    (run.out / ".writable").unlink()
    if not path.exists():
        return
    if not run.resume:
        raise FileExistsError(
            f"out must be a folder without a run, got {run.out}; continue it with --resume or "
            "choose another"
        )
    # A field that came later had its default then.
    defaults = {f.name: f.default for f in fields(run)}
    then, now = {**defaults, **json.loads(path.read_text())}, as_json(run)
    changed = [k for k in now if k not in FREE_ON_RESUME and then[k] != now[k]]
    if changed:
        listing = "; ".join(f"{k}: {then[k]!r} then, {now[k]!r} now" for k in changed)
        raise ValueError(f"run must be the one in {run.out} to resume it, got {listing}")


def as_json(run: LanguageModelRun) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(run), default=str))
