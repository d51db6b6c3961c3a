"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors` with `config.json`).

h = x W_enc + b_enc, acts = h where h > threshold, x_hat = acts W_dec + b_dec; both have transcoders
too, the second with x affine_skip_connection added to the output where there is one. Nothing is
subtracted from x. Which model and which activation an SAE is of says the name of its repository and
folder, so keep `gemma-scope-2b-pt-res/layer_20/width_16k/...` in the path of a local copy.
"""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
NATIVE = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
HF_POINT = re.compile(r"model\.layers\.(\d+)\.(.+)")
HF_SITES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
}
TRAINED_ON: dict[str, Any] = {
    "prepend_bos": True,
    "context_size": 1024,
    "dataset_path": "monology/pile-uncopyrighted",
}


def matches(path: Path) -> bool:
    return any((path / f"params.{end}").is_file() for end in ("npz", "safetensors"))


def read(path: Path) -> Checkpoint:
    first = path / "params.npz"
    source = first if first.is_file() else path / "params.safetensors"
    tensors = {name.lower(): t for name, t in read_tensors(source).items()}
    weights: dict[str, Tensor] = dict(zip(NATIVE, pick(tensors, NAMES, source), strict=True))
    if source == first:
        architecture, metadata = _of_the_first(path, weights)
    else:
        architecture, metadata = "jumprelu", _of_the_second(path)
    if metadata.get("hook_name_out") is not None:
        architecture = "jumprelu_transcoder"
    if "affine_skip_connection" in tensors:
        architecture = "jumprelu_skip_transcoder"
        weights["W_skip"] = tensors["affine_skip_connection"].t()
    heads = str(metadata.get("hook_name")).endswith("hook_z") and "transcoder" not in architecture
    return checkpoint(
        architecture,
        weights,
        {**TRAINED_ON, **metadata},
        apply_b_dec_to_input=False,
        reshape_activations="hook_z" if heads else "none",
    )


def _of_the_first(path: Path, weights: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    metadata: dict[str, Any] = {}
    embedding = "embedding" in path.parts
    if embedding:  # trained on rows times sqrt(D), as the model itself has them
        root = math.sqrt(weights["W_enc"].shape[0])
        weights["W_enc"], weights["W_dec"] = weights["W_enc"] / root, weights["W_dec"] * root
        metadata["hook_name"] = "hook_embed"
    repository = REPOSITORY.search(path.as_posix())
    if repository is None:
        return "jumprelu", metadata
    size, kind, site = repository.groups()
    metadata["model_name"] = f"gemma-2-{size}" + ("-it" if kind == "it" else "")
    layer = re.search(r"layer_(\d+)", path.as_posix())
    if layer is None or embedding:
        return "jumprelu", metadata
    block = f"blocks.{layer[1]}"
    if site == "transcoders":
        metadata["hook_name"] = f"{block}.ln2.hook_normalized"
        metadata["hook_name_out"] = f"{block}.hook_mlp_out"
    else:
        metadata["hook_name"] = f"{block}.{SITES[site]}"
    return "jumprelu", metadata


def _of_the_second(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    config = read_json(file) if file.is_file() else _from_the_path(path)
    metadata: dict[str, Any] = {}
    model = str(config.get("model_name") or "")
    if model:
        model = model.replace("-v3", "-3")
        model = model.replace("-pt", "") if "270m" in model else model
        metadata["model_name"] = model if "google" in model else f"google/{model}"
    point_in, point_out = (config.get(f"hf_hook_point_{side}") for side in ("in", "out"))
    if point_in is not None:
        metadata |= {"hook_name": _hook_name(point_in), "hf_hook_name": point_in}
    if point_out not in (None, point_in):
        metadata |= {"hook_name_out": _hook_name(point_out), "hf_hook_name_out": point_out}
    return metadata


def _hook_name(point: str) -> str:
    """TransformerLens's name of an activation of the Hugging Face model."""
    found = HF_POINT.fullmatch(point)
    if found is None or found[2] not in HF_SITES:
        return point
    return f"blocks.{found[1]}.{HF_SITES[found[2]]}"


def _from_the_path(path: Path) -> dict[str, Any]:
    text = path.as_posix()
    layer, repository = re.search(r"layer_(\d+)", text), re.search(r"gemma-scope-2-[^/]+", text)
    config: dict[str, Any] = {}
    if repository is not None:
        config["model_name"] = repository[0].replace("gemma-scope-2", "gemma-3")
    sites = {
        "transcoder": "pre_feedforward_layernorm.output",
        "resid_post": "output",
        "attn_out": "self_attn.o_proj.input",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    for site, point in sites.items():
        if layer is not None and site in text:
            config["hf_hook_point_in"] = f"model.layers.{layer[1]}.{point}"
            if site == "transcoder":
                end = "post_feedforward_layernorm.output"
                config["hf_hook_point_out"] = f"model.layers.{layer[1]}.{end}"
            break
    return config
