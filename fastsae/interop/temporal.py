"""Temporal SAEs as published: a folder with `conf.yaml` and `latest_ckpt.safetensors`.

Their tensors are D (W_dec [F, D]), b (b_dec), E (W_enc [D, F], where it is not W_dec transposed)
and `attn_layers.*`.
"""

import re
from pathlib import Path

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_tensors
from fastsae.interop.layer_transcoders import read_yaml

CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"
COPIED = (
    "n_heads",
    "n_attn_layers",
    "bottleneck_factor",
    "sae_diff_type",
    "kval_topk",
    "tied_weights",
)


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    source = path / WEIGHTS
    (settings,) = pick(read_yaml(path / CONFIG), ["sae"], path / CONFIG)
    copied = dict(zip(COPIED, pick(settings, COPIED, path / CONFIG), strict=True))
    (factor,) = pick(settings, ["scaling_factor"], path / CONFIG)
    tensors = read_tensors(source)
    W_dec, b_dec = pick(tensors, ("D", "b"), source)
    weights = {name: t for name, t in tensors.items() if name.startswith("attn_layers.")}
    W_enc = W_dec.t() if copied["tied_weights"] else pick(tensors, ["E"], source)[0]
    weights |= {"W_dec": W_dec, "b_dec": b_dec, "W_enc": W_enc}
    layer = re.search(r"layer_(\d+)", path.as_posix())
    made = checkpoint(
        "temporal",
        weights,
        {} if layer is None else {"hook_name": f"blocks.{layer[1]}.hook_resid_post"},
        **copied,
        normalize_activations="constant_scalar_rescale",
        activation_normalization_factor=float(factor),
    )
    if copied["tied_weights"]:
        del made.weights["W_enc"]
    return made
