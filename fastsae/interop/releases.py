"""Which SAEs are published where: SAELens's directory, read from the installed package."""

import difflib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.extras import require


class Entry(NamedTuple):
    """Where a published SAE is, and what its own files do not say."""

    repo: str
    path: str
    """A folder, a file or, for `W_enc_{n}.safetensors`, a number below the repository."""
    neuronpedia_id: str | None = None
    model: str | None = None
    overrides: Mapping[str, Any] = {}
    """Fields of the configuration or of its metadata, which hold whatever the files say."""
    scale: float | None = None
    """What rows were multiplied by when it was trained, where that is not folded in."""


@cache
def directory() -> dict[str, dict[str, Any]]:
    """SAELens's releases, name -> repository, model and SAEs; empty without sae-lens."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        return {}
    yaml = require("yaml", extra="peers")
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text()
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def find(release: str, sae_id: str) -> Entry:
    """Where a release's SAE is.

    Raises:
        ValueError: there is none of that name; near matches are listed.
    """
    releases = directory()
    if release not in releases:
        if "/" in release:
            return Entry(release, sae_id)
        near = difflib.get_close_matches(release, releases, n=5, cutoff=0.4)
        raise ValueError(
            "release must be a local folder, user/repository on the hub or a name in SAELens's "
            f"directory ({len(releases)} known, with sae-lens installed), got {release!r}; "
            f"nearest: {near}"
        )
    found = releases[release]
    for sae in found["saes"]:
        if str(sae["id"]) == sae_id:
            return Entry(
                found["repo_id"],
                str(sae["path"]),
                sae.get("neuronpedia"),
                found.get("model"),
                found.get("config_overrides") or {},
                sae.get("norm_scaling_factor"),
            )
    ids = [str(sae["id"]) for sae in found["saes"]]
    near = difflib.get_close_matches(sae_id, ids, n=5, cutoff=0.3) or ids[:5]
    raise ValueError(
        f"sae_id must be one of the {len(ids)} of release {release}, got {sae_id!r}; "
        f"nearest: {near}"
    )
