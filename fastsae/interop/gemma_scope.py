"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors` with `config.json`).

h = x W_enc + b_enc, acts = h where h > threshold, x_hat = acts W_dec + b_dec; Gemma Scope 2 has
transcoders too, with x affine_skip_connection added to the output. Nothing is subtracted from x.
"""

from pathlib import Path

from torch import Tensor

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
NATIVE = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def matches(path: Path) -> bool:
    return (path / "params.npz").is_file() or (path / "params.safetensors").is_file()


def read(path: Path) -> Checkpoint:
    first = path / "params.npz"
    source = first if first.is_file() else path / "params.safetensors"
    tensors = {name.lower(): t for name, t in read_tensors(source).items()}
    weights: dict[str, Tensor] = dict(zip(NATIVE, pick(tensors, NAMES, source), strict=True))
    architecture, metadata = "jumprelu", {}
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        named = {
            "model_name": "model_name",
            "hook_name": "hf_hook_point_in",
            "hook_name_out": "hf_hook_point_out",
        }
        metadata = {name: config[key] for name, key in named.items() if key in config}
        if metadata.get("hook_name_out", metadata.get("hook_name")) != metadata.get("hook_name"):
            architecture = "jumprelu_transcoder"
    if "affine_skip_connection" in tensors:
        architecture = "jumprelu_skip_transcoder"
        weights["W_skip"] = tensors["affine_skip_connection"].t()
    return checkpoint(architecture, weights, metadata, apply_b_dec_to_input=False)
