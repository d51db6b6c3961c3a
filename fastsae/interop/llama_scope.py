"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`.

With s = sqrt(D) / the data set's average norm: h = s x W_enc + b_enc, acts = h where h > the
threshold, x_hat = (acts W_dec + b_dec) / s. The scale is folded in on the way: raw rows go in.
The threshold on disk is one of unscaled rows, and is multiplied by s.

Llama Scope R1-Distill, `config.json` and `sae_weights.safetensors`, has a threshold a latent, of
scaled rows, as its logarithm; s is known to SAELens's directory and not to the folder.
"""

import math
from pathlib import Path
from typing import Any

import torch

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
R1_CONFIG, R1_WEIGHTS = "config.json", "sae_weights.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
TRAINED_ON: dict[str, Any] = {
    "model_name": "meta-llama/Llama-3.1-8B",
    "prepend_bos": True,
    "context_size": 1024,
    "dataset_path": "cerebras/SlimPajama-627B",
}


def matches(path: Path) -> bool:
    pairs = ((CONFIG, WEIGHTS), (R1_CONFIG, R1_WEIGHTS))
    return any((path / c).is_file() and (path / w).is_file() for c, w in pairs)


def read(path: Path) -> Checkpoint:
    first = (path / CONFIG).is_file()
    config_file, source = path / (CONFIG if first else R1_CONFIG), path / WEIGHTS
    source = source if first else path / R1_WEIGHTS
    config, tensors = read_json(config_file), read_tensors(source)
    W_enc, b_enc, W_dec, b_dec = (t.float() for t in pick(tensors, NAMES, source))
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec.t(), "b_dec": b_dec}
    hook = config.get("hook_point_in")
    metadata = TRAINED_ON if hook is None else {**TRAINED_ON, "hook_name": hook}
    if not first:
        (log_threshold,) = pick(tensors, ["log_jumprelu_threshold"], source)
        weights["threshold"] = log_threshold.float().exp()
        return checkpoint(
            "jumprelu",
            weights,
            metadata,
            apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in",
        )
    names = ("jump_relu_threshold", "dataset_average_activation_norm")
    threshold, norms = pick(config, names, config_file)
    scale = math.sqrt(W_enc.shape[1]) / float(norms["in"])
    weights["W_enc"] = weights["W_enc"] * scale
    weights["W_dec"], weights["b_dec"] = weights["W_dec"] / scale, b_dec / scale
    weights["threshold"] = torch.full_like(b_enc, float(threshold) * scale)
    return checkpoint("jumprelu", weights, metadata, apply_b_dec_to_input=False)
