"""SAELens 6's folder: `cfg.json` and `sae_weights.safetensors`, row-major tensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.files import current, replacing_together
from fastsae.saes.base import SAE
from fastsae.saes.config import SAEConfig
from fastsae.saes.older_format import FORMAT_VERSION, from_before_6, is_of_version_6

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
INDEX = "sae_weights.safetensors.index.json"
"""Beside several files of weights, of a dictionary too large for one."""
BESIDE = ("architecture", "device", "metadata", "reshape_activations", "use_sparse_activations")
"""Fields of a cfg.json that no configuration of ours need have."""


def write_sae(sae: SAE, path: Path) -> tuple[Path, Path]:
    """Both files take their places together: a kill leaves the old SAE or the new one."""
    weights = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    with replacing_together(path) as temporary:
        (temporary / CONFIG).write_text(config_of(sae))
        save_file(weights, temporary / WEIGHTS)
    (path / INDEX).unlink(missing_ok=True)
    return path / WEIGHTS, path / CONFIG


def config_of(sae: SAE) -> str:
    """The text of its `cfg.json`."""
    config = sae.cfg.to_dict()
    config["device"] = "cpu"
    config["metadata"] = {"sae_lens_version": FORMAT_VERSION, **config["metadata"]}
    return json.dumps(config, indent=2) + "\n"


def read_sae(path: Path, device: torch.device | str) -> SAE:
    return build_sae(*read_checkpoint(path), device, source=str(path))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a folder, in version 6's names whatever its version."""
    config_file, weights_files = current(path / CONFIG), _weights_files(path)
    if not (config_file.is_file() and all(file.is_file() for file in weights_files)):
        raise FileNotFoundError(f"path must be a folder with {CONFIG} and {WEIGHTS}, got {path}")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} must be JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} must be a JSON object, got {type(config).__name__}")
    try:
        weights = {name: t for file in weights_files for name, t in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is truncated or damaged: {error}") from error
    if is_of_version_6(config):
        return config, weights
    return from_before_6(config, weights, source=path)


def _weights_files(path: Path) -> list[Path]:
    index = current(path / INDEX)
    if current(path / WEIGHTS).is_file() or not index.is_file():
        return [current(path / WEIGHTS)]
    names = json.loads(index.read_text())["weight_map"].values()
    return [current(path / name) for name in sorted(set(names))]


def build_sae(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    device: torch.device | str,
    source: str,
) -> SAE:
    """The SAE of a configuration and tensors in SAELens 6's names.

    Args:
        source: what errors name as the place both came from.

    Raises:
        ValueError: the architecture is unknown, or the tensors are not those of the configuration.
    """
    from fastsae.saes import SAES

    architecture = config.get("architecture")
    if architecture not in SAES:
        raise ValueError(
            f"architecture must be one of {sorted(SAES)}, got {architecture!r} in {source}"
        )
    sae_class = SAES[architecture]
    _refuse_the_future(config, sae_class.config_class, source)
    try:
        cfg = sae_class.config_class.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} must describe a {architecture} SAE: {error}") from error
    sae = sae_class(cfg, device=device)
    wanted = {name: list(t.shape) for name, t in sae.state_dict().items()}
    found = {name: list(t.shape) for name, t in weights.items()}
    if wanted != found:
        raise ValueError(f"{source} must hold the tensors {wanted} for its {CONFIG}, got {found}")
    sae.load_state_dict(dict(weights))  # copies, which keeps W_enc's memory order
    return sae


def _refuse_the_future(
    config: Mapping[str, Any], config_class: type[SAEConfig], source: str
) -> None:
    """Raise ValueError for what a later version may mean otherwise.

    That is another major version, and a field that is not known here from a later minor one; what
    versions up to ours write beside the mathematics is left out by `from_dict`.
    """
    stated = (config.get("metadata") or {}).get("sae_lens_version")
    if stated is None or _numbers(stated) <= _numbers(FORMAT_VERSION):
        return
    expected = f"{source}: {CONFIG} must be of SAELens {FORMAT_VERSION} or before"
    if _numbers(stated)[0] > _numbers(FORMAT_VERSION)[0]:
        raise ValueError(f"{expected}, got sae_lens_version {stated!r}")
    known = {*(f.name for f in fields(config_class)), *BESIDE}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"{expected} to have other fields than {sorted(known)}, got {unknown[0]!r} in one of "
            f"sae_lens_version {stated!r}"
        )


def _numbers(version: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(version))[:3]) or (0,)
