"""SAEs by release and id: from a local folder, or from the hub through huggingface_hub."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastsae.extras import require
from fastsae.interop.formats import load_checkpoint
from fastsae.saes import SAE
from fastsae.saes.native_format import build_sae

SPARSITY = "sparsity.safetensors"


class Entry(NamedTuple):
    """Where a published SAE is."""

    repo: str
    folder: str
    neuronpedia_id: str | None
    model: str | None


def from_pretrained(
    release: str, sae_id: str, *, device: torch.device | str = "cpu", force_download: bool = False
) -> tuple[SAE, dict[str, Any], Tensor | None]:
    """An SAE, its configuration, and log10 of its latents' firing frequencies where published.

    Args:
        release: a local folder; a name in SAELens's directory (where sae-lens is installed, whose
            file it is); or `user/repository` on the hub.
        sae_id: the SAE's folder below it, or its id in the directory.

    Raises:
        ValueError: the release or the id is unknown; near matches are listed.
        OSError: it is not in the cache and the hub cannot be reached.
    """
    if Path(release).is_dir():
        return _load(Path(release) / sae_id, device, Entry(release, sae_id, None, None))
    entry = find(release, sae_id)
    hub = require("huggingface_hub", extra="train")
    try:
        root = hub.snapshot_download(
            entry.repo, allow_patterns=f"{entry.folder}/*", force_download=force_download
        )
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("hugg"):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"release {release} must be in huggingface_hub's cache or the hub within reach, got "
            f"{type(error).__name__}: {reason}; with a local copy pass its folder as release and "
            f"{entry.folder!r} as sae_id"
        ) from error
    return _load(Path(root) / entry.folder, device, entry)


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
            return Entry(release, sae_id, None, None)
        near = difflib.get_close_matches(release, releases, n=5, cutoff=0.4)
        raise ValueError(
            "release must be a local folder, user/repository on the hub or a name in SAELens's "
            f"directory ({len(releases)} known, with sae-lens installed), got {release!r}; "
            f"nearest: {near}"
        )
    found = releases[release]
    for entry in found["saes"]:
        if entry["id"] == sae_id:
            return Entry(
                found["repo_id"], entry["path"], entry.get("neuronpedia"), found.get("model")
            )
    ids = [str(entry["id"]) for entry in found["saes"]]
    near = difflib.get_close_matches(sae_id, ids, n=5, cutoff=0.3) or ids[:5]
    raise ValueError(
        f"sae_id must be one of the {len(ids)} of release {release}, got {sae_id!r}; "
        f"nearest: {near}"
    )


def _load(
    path: Path, device: torch.device | str, entry: Entry
) -> tuple[SAE, dict[str, Any], Tensor | None]:
    made = load_checkpoint(path)
    known = {"neuronpedia_id": entry.neuronpedia_id, "model_name": entry.model}
    metadata = {k: v for k, v in known.items() if v is not None}
    config = {**made.config, "metadata": {**metadata, **made.config.get("metadata", {})}}
    if entry.neuronpedia_id is not None:
        config["metadata"]["neuronpedia_id"] = entry.neuronpedia_id
    sae = build_sae(config, made.weights, device, source=str(path))
    file = path / SPARSITY
    return sae, config, load_file(file)["sparsity"] if file.is_file() else None
