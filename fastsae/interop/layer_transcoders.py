"""Transcoders of a model's MLPs, a file or two a layer at the root of a repository.

`layer_{n}.safetensors` with `wandb-config.yaml` (Hanna): W_enc [F, D], W_dec [F, D], b_enc, b_dec.
`W_enc_{n}.safetensors` and `W_dec_{n}.safetensors` with `config.yaml` are a layer of a cross-layer
transcoder, named `{folder}/{n}`: the decoders for all later layers are summed, as SAELens does, so
that acts are exact and the reconstruction stands for none of the layers.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.extras import require
from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_tensors

FILE = re.compile(r"layer_(\d+)\.safetensors")
WANDB = ("wandb-config.yaml", "wanb-config.yaml")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def matches(path: Path) -> bool:
    return _is_of_one_layer(path) or _across(path, "enc").is_file()


def _is_of_one_layer(path: Path) -> bool:
    beside = any((path.parent / name).is_file() for name in WANDB)
    return path.is_file() and FILE.fullmatch(path.name) is not None and beside


def _across(path: Path, side: str) -> Path:
    return path.parent / f"W_{side}_{path.name}.safetensors"


def read(path: Path) -> Checkpoint:
    return _one_layer(path) if _is_of_one_layer(path) else _cross_layer(path)


def _one_layer(path: Path) -> Checkpoint:
    layer = path.stem.removeprefix("layer_")
    W_enc, b_enc, W_dec, b_dec = pick(read_tensors(path), NAMES, path)
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    known = path.parent / "config.yaml"
    metadata = {"model_name": read_yaml(known).get("model_name")} if known.is_file() else {}
    if not metadata:
        size = re.search(r"qwen3-(\d+(?:\.\d+)?)b", path.as_posix())
        metadata = {} if size is None else {"model_name": f"Qwen/Qwen3-{size[1]}B"}
    run = next(path.parent / name for name in WANDB if (path.parent / name).is_file())
    context = (read_yaml(run).get("batch_size") or {}).get("value")
    points = {"hook_name": f"blocks.{layer}.mlp.hook_in"}
    return _transcoder(weights, {**metadata, **points, "context_size": context}, layer)


def _cross_layer(path: Path) -> Checkpoint:
    layer, encoder, decoder = path.name, _across(path, "enc"), _across(path, "dec")
    names = [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec")]
    W_enc, b_enc, b_dec = pick(read_tensors(encoder), names, encoder)
    (W_dec,) = pick(read_tensors(decoder), [f"W_dec_{layer}"], decoder)
    warnings.warn(
        f"{path} is of a cross-layer transcoder: its decoders are summed, so that only its acts "
        "are to be used, not what it reconstructs",
        stacklevel=2,
    )
    config = path.parent / "config.yaml"
    settings = read_yaml(config)
    model, point_in, point_out = pick(
        settings, ("model_name", "feature_input_hook", "feature_output_hook"), config
    )
    metadata = {"model_name": model, "hook_name": f"blocks.{layer}.{point_in}"}
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "b_dec": b_dec, "W_dec": W_dec.sum(1)}
    return _transcoder(weights, {**metadata, "hook_name_out": f"blocks.{layer}.{point_out}"}, layer)


def _transcoder(weights: dict[str, Tensor], metadata: dict[str, Any], layer: str) -> Checkpoint:
    known = {
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        "model_from_pretrained_kwargs": {"fold_ln": False},
        **{name: value for name, value in metadata.items() if value is not None},
    }
    return checkpoint("transcoder", weights, known, apply_b_dec_to_input=False)


def read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="train")
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a YAML mapping, got {type(value).__name__}")
    return value
