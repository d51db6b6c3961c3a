"""SAEs by release and id: from a local folder, or from the hub through huggingface_hub."""

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.extras import require
from fastsae.interop.checkpoint import pick, read_tensors
from fastsae.interop.formats import load_checkpoint
from fastsae.interop.releases import Entry, find
from fastsae.saes import SAE, SAES
from fastsae.saes.native_format import build_sae
from fastsae.saes.older_format import from_before_6, is_of_version_6

SPARSITY = "sparsity.safetensors"
ROOT_FILES = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")
"""Beside SAEs that are single files at the root of a repository."""
Converter = Callable[..., tuple[dict[str, Any], dict[str, Tensor], Tensor | None]]
"""SAELens's kind of loader: (repo_id, folder_name, device, force_download, cfg_overrides) ->
configuration, tensors in its names, log10 sparsity."""


class Pretrained(NamedTuple):
    sae: SAE
    config: dict[str, Any]
    """cfg.json of SAELens 6, as the SAE was built from."""
    log_sparsity: Tensor | None
    """log10 of the latents' firing frequencies, where published."""


def from_pretrained(
    release: str,
    sae_id: str,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    force_download: bool = False,
    converter: Converter | None = None,
    fold_W_dec_norm: bool = False,
) -> Pretrained:
    """An SAE, its configuration, and log10 of its latents' firing frequencies where published.

    Args:
        release: a local folder; a name in SAELens's directory (where sae-lens is installed, whose
            file it is); or `user/repository` on the hub.
        sae_id: the SAE's folder or file below it, or its id in the directory.
        dtype: of the parameters; None: that of the file.
        converter: reads files of a kind that is not known here.

    Raises:
        ValueError: the release or the id is unknown; near matches are listed.
        OSError: it is not in the cache and the hub cannot be reached.
    """
    if Path(release).is_dir():
        entry, path = Entry(release, sae_id), Path(release) / sae_id
    else:
        entry = find(release, sae_id)
        path = None if converter is not None else _download(release, entry, force_download)
    if path is None or converter is not None:
        assert converter is not None
        overrides = {**entry.overrides, "device": str(device), "dtype": dtype or "float32"}
        config, weights, sparsity = converter(
            entry.repo, entry.path, str(device), force_download, overrides
        )
        if not is_of_version_6(config):
            config, weights = from_before_6(config, weights, source=Path(entry.repo) / entry.path)
    else:
        config, weights = load_checkpoint(path)
        file = path / SPARSITY
        sparsity = pick(read_tensors(file), ["sparsity"], file)[0] if file.is_file() else None
    config = _with_overrides(config, entry)
    sae = build_sae(config, weights, device, source=f"{entry.repo}/{entry.path}")
    return Pretrained(_finished(sae, config, entry, dtype, fold_W_dec_norm), config, sparsity)


def _download(release: str, entry: Entry, force: bool) -> Path:
    hub = require("huggingface_hub", extra="train")
    path = entry.path
    wanted = [path, f"{path}/*", f"{path}.safetensors", f"{path.removesuffix('.pt')}_cfg.json"]
    wanted += [*ROOT_FILES, f"W_enc_{path}.safetensors", f"W_dec_{path}.safetensors"]
    way_out = f"with a local copy pass its folder as release and {path!r} as sae_id"
    try:
        root = Path(hub.snapshot_download(entry.repo, allow_patterns=wanted, force_download=force))
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("hugg"):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"release {release} must be in huggingface_hub's cache or the hub within reach, got "
            f"{type(error).__name__}: {reason}; {way_out}"
        ) from error
    names = [p.relative_to(root).as_posix() for p in root.rglob("*")]
    if not any(name.startswith((path, f"W_enc_{path}.")) for name in names):
        raise OSError(
            f"release {release} must have {path}, got a copy of {entry.repo} without it: a cache "
            f"that is incomplete while the hub is out of reach, or another name; {way_out}"
        )
    return root / path


def _with_overrides(config: dict[str, Any], entry: Entry) -> dict[str, Any]:
    """The configuration with what the directory says of this SAE, each fact where it belongs."""
    config, metadata = dict(config), dict(config.get("metadata") or {})
    if entry.model is not None and metadata.get("model_name") is None:
        metadata["model_name"] = entry.model
    known = {f.name for f in fields(SAES[config["architecture"]].config_class)}
    for name, value in entry.overrides.items():
        (config if name in known else metadata)[name] = value
    if entry.neuronpedia_id is not None:
        metadata["neuronpedia_id"] = entry.neuronpedia_id
    return {**config, "metadata": metadata}


def _finished(
    sae: SAE, config: dict[str, Any], entry: Entry, dtype: str | None, fold_W_dec_norm: bool
) -> SAE:
    if sae.cfg.normalize_activations == "expected_average_only_in":
        if entry.scale is None:
            warnings.warn(
                f"{entry.repo}/{entry.path} was trained on rows of another scale, which is not "
                "stated: multiply rows by sqrt(D) / their mean norm, or use fold_activation_scale",
                stacklevel=3,
            )
        else:
            sae.fold_activation_scale(entry.scale)
            config["normalize_activations"] = "none"
    if fold_W_dec_norm:
        sae.fold_W_dec_norm()
    return sae if dtype is None else in_dtype(sae, dtype)


def in_dtype(sae: SAE, dtype: str | torch.dtype) -> SAE:
    """The SAE with parameters in `dtype`, which is its configuration's from here on.

    Raises:
        ValueError: no floating dtype of torch is called so.
    """
    name = str(dtype).removeprefix("torch.")
    sae.cfg = replace(sae.cfg, dtype=name)  # checks the name
    return sae.to(getattr(torch, name))
