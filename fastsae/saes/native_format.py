"""SAELens 6's folder: `cfg.json` and `sae_weights.safetensors`, row-major tensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastsae.files import replacing
from fastsae.saes.base import SAE

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
# Without a version of at least 6 SAELens reads the file as an older format and drops its metadata.
FORMAT_VERSION = "6.54.12"


def write_sae(sae: SAE, path: Path) -> tuple[Path, Path]:
    """Both files are written before either takes its place."""
    config = sae.cfg.to_dict()
    config["device"] = "cpu"
    config["metadata"] = {"sae_lens_version": FORMAT_VERSION, **config["metadata"]}
    weights = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    with replacing(path / CONFIG) as new_config, replacing(path / WEIGHTS) as new_weights:
        new_config.write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, new_weights)
    return path / WEIGHTS, path / CONFIG


def read_sae(path: Path, device: torch.device | str) -> SAE:
    from fastsae.saes import SAES

    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"path must be a folder with {CONFIG} and {WEIGHTS}, got {path}"
            )
    try:
        config = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} must be JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} must be a JSON object, got {type(config).__name__}")
    architecture = config.get("architecture")
    if architecture not in SAES:
        raise ValueError(
            f"architecture must be one of {sorted(SAES)}, got {architecture!r} in {path / CONFIG}"
        )
    sae_class = SAES[architecture]
    try:
        weights = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is truncated or damaged: {error}") from error
    try:
        cfg = sae_class.config_class.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG} must describe a {architecture} SAE: {error}") from error
    sae = sae_class(cfg, device=device)
    wanted = {name: list(t.shape) for name, t in sae.state_dict().items()}
    found = {name: list(t.shape) for name, t in weights.items()}
    if wanted != found:
        raise ValueError(f"{path / WEIGHTS} must hold {wanted} for its {CONFIG}, got {found}")
    sae.load_state_dict(weights)  # copies, which keeps W_enc's memory order
    return sae
