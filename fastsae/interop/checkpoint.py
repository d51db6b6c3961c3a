"""What every foreign reader makes of a file: a configuration and tensors in SAELens 6's names."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsae.saes.older_format import FORMAT_VERSION


class Checkpoint(NamedTuple):
    """An SAE that is not built yet."""

    config: dict[str, Any]
    """cfg.json of SAELens 6: architecture, d_in, d_sae, ..., metadata."""
    weights: dict[str, Tensor]
    """W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D] and what else the architecture has."""


def checkpoint(
    architecture: str, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], **fields: Any
) -> Checkpoint:
    """A checkpoint in float32 whose widths are read off its tensors."""
    tensors = {name: t.to(torch.float32) for name, t in weights.items()}
    d_in, d_sae = tensors["W_enc"].shape
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        **({"d_out": tensors["W_dec"].shape[1]} if "transcoder" in architecture else {}),
        **fields,
        "metadata": {"sae_lens_version": FORMAT_VERSION, **metadata},
    }
    return Checkpoint(config, tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .npz or .pt file; nothing else is ever unpickled.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is truncated, or holds other objects than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of weights, got {path} and nothing there")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    except Exception as error:
        if type(error).__name__ not in ("UnpicklingError", "BadZipFile"):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is truncated or damaged, or holds more than tensors: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def pick(tensors: Mapping[str, Any], names: Iterable[str], source: Path) -> list[Any]:
    """These entries.

    Raises:
        ValueError: one is absent; it is named, with those that there are.
    """
    names = list(names)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{source} must hold {names}, got {sorted(tensors)} without {missing}")
    return [tensors[name] for name in names]
