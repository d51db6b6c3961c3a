"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`.

With s = sqrt(D) / the data set's average norm: h = s x W_enc + b_enc, acts = h where h > the
threshold, x_hat = (acts W_dec + b_dec) / s. The scale is folded in on the way: raw rows go in.
The threshold on disk is one of unscaled rows, and is multiplied by s.
"""

import math
from pathlib import Path

import torch

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    config, source = read_json(path / CONFIG), path / WEIGHTS
    tensors = read_tensors(source)
    W_enc, b_enc, W_dec, b_dec = (t.float() for t in pick(tensors, NAMES, source))
    threshold, norms = pick(
        config, ("jump_relu_threshold", "dataset_average_activation_norm"), path / CONFIG
    )
    scale = math.sqrt(W_enc.shape[1]) / float(norms["in"])
    weights = {
        "W_enc": W_enc.t() * scale,
        "b_enc": b_enc,
        "W_dec": W_dec.t() / scale,
        "b_dec": b_dec / scale,
        "threshold": torch.full_like(b_enc, float(threshold) * scale),
    }
    hook = config.get("hook_point_in")
    metadata = {} if hook is None else {"hook_name": hook}
    return checkpoint("jumprelu", weights, metadata, apply_b_dec_to_input=False)
