"""dictionary_learning: a trainer's folder with `config.json` and `ae.pt`.

AutoEncoder:          acts = relu((x - bias) W_enc + b_enc), x_hat = acts W_dec + bias
AutoEncoderNew:       acts = relu(x W_enc + b_enc), x_hat = acts W_dec + b_dec
AutoEncoderTopK:      acts = the k largest of relu((x - b_dec) W_enc + b_enc)
BatchTopKSAE, MatryoshkaBatchTopKSAE: the same acts where they are above one threshold
JumpReluAutoEncoder:  acts = h where h > threshold, h = x W_enc + b_enc
GatedAutoEncoder:     gate and magnitude as in fastsae's GatedSAE
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import replacing_together
from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

CONFIG, WEIGHTS = "config.json", "ae.pt"
SITES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attention_out": "hook_attn_out",
}
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    config = read_json(path / CONFIG)
    trainer = pick(config, ["trainer"], path / CONFIG)[0]
    kind = trainer.get("dict_class")
    if kind not in READERS:
        raise ValueError(
            f"dict_class must be one of {sorted(READERS)}, got {kind!r} in {path / CONFIG}"
        )
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": _hook_name(trainer),
        "context_size": (config.get("buffer") or {}).get("ctx_len"),
    }
    source = path / WEIGHTS
    architecture, weights, fields = READERS[kind](read_tensors(source), source)
    known = {k: v for k, v in metadata.items() if v is not None}
    return checkpoint(architecture, weights, known, **fields)


def _hook_name(trainer: dict[str, Any]) -> str | None:
    """TransformerLens's name where the submodule's, such as resid_post_layer_12, says which it is;
    the residual stream after `layer` where there is no name."""
    name = trainer.get("submodule_name")
    for site, hook in SITES.items():
        layer = re.fullmatch(rf"{site}_layer_(\d+)", str(name))
        if layer is not None:
            return f"blocks.{layer[1]}.{hook}"
    layer = trainer.get("layer")
    return f"blocks.{layer}.hook_resid_post" if name is None and layer is not None else name


Read = tuple[str, dict[str, Tensor], dict[str, Any]]


def _standard(tensors: dict[str, Tensor], source: Path) -> Read:
    W_enc, b_enc, W_dec, b_dec = pick(tensors, (*LINEAR, "bias"), source)
    return "standard", _weights(W_enc.t(), b_enc, W_dec.t(), b_dec), {}


def _standard_uncentred(tensors: dict[str, Tensor], source: Path) -> Read:
    W_enc, b_enc, W_dec, b_dec = pick(tensors, (*LINEAR, "decoder.bias"), source)
    weights = _weights(W_enc.t(), b_enc, W_dec.t(), b_dec)
    return "standard", weights, {"apply_b_dec_to_input": False}


def _topk(tensors: dict[str, Tensor], source: Path) -> Read:
    W_enc, b_enc, W_dec, b_dec, k = pick(tensors, (*LINEAR, "b_dec", "k"), source)
    weights = _weights(W_enc.t(), b_enc, W_dec.t(), b_dec)
    return "topk", weights, {"k": int(k), "rescale_acts_by_decoder_norm": False}


def _batch_topk(tensors: dict[str, Tensor], source: Path) -> Read:
    W_enc, b_enc, W_dec, b_dec, threshold = pick(tensors, (*LINEAR, "b_dec", "threshold"), source)
    return _thresholded(_weights(W_enc.t(), b_enc, W_dec.t(), b_dec), threshold, source)


def _matryoshka(tensors: dict[str, Tensor], source: Path) -> Read:
    *weights, threshold = pick(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), source)
    return _thresholded(_weights(*weights), threshold, source)


def _thresholded(weights: dict[str, Tensor], threshold: Tensor, source: Path) -> Read:
    if float(threshold) < 0:
        raise ValueError(
            f"threshold must be at least 0, got {float(threshold)} in {source}: that SAE has not "
            "been trained long enough to have one"
        )
    weights["threshold"] = threshold.float().expand(len(weights["b_enc"])).clone()
    return "jumprelu", weights, {}


def _jumprelu(tensors: dict[str, Tensor], source: Path) -> Read:
    *weights, threshold = pick(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), source)
    return (
        "jumprelu",
        {**_weights(*weights), "threshold": threshold},
        {"apply_b_dec_to_input": False},
    )


def _gated(tensors: dict[str, Tensor], source: Path) -> Read:
    names = ("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag")
    W_enc, W_dec, b_dec, b_gate, b_mag, r_mag = pick(tensors, names, source)
    weights = {"W_enc": W_enc.t(), "W_dec": W_dec.t(), "b_dec": b_dec}
    return "gated", {**weights, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}, {}


def _weights(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


READERS: dict[str, Callable[[dict[str, Tensor], Path], Read]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_uncentred,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
}


def write(made: Checkpoint, path: Path) -> None:
    config, weights = made
    architecture = config["architecture"]
    linear = {"encoder.weight": weights["W_enc"].t(), "decoder.weight": weights["W_dec"].t()}
    trainer: dict[str, Any] = {
        "activation_dim": config["d_in"],
        "dict_size": config["d_sae"],
        "lm_name": config["metadata"].get("model_name"),
        "submodule_name": config["metadata"].get("hook_name"),
    }
    if architecture in ("topk", "gated") and not config["apply_b_dec_to_input"]:
        raise ValueError(
            f"apply_b_dec_to_input must be True for a {architecture} SAE of dictionary_learning, "
            "which always subtracts b_dec, got False"
        )
    if architecture == "standard" and not config["apply_b_dec_to_input"]:
        trainer["dict_class"] = "AutoEncoderNew"
        tensors = linear | {"encoder.bias": weights["b_enc"], "decoder.bias": weights["b_dec"]}
    elif architecture == "standard":
        trainer["dict_class"] = "AutoEncoder"
        tensors = linear | {"encoder.bias": weights["b_enc"], "bias": weights["b_dec"]}
    elif architecture == "topk":
        trainer |= {"dict_class": "AutoEncoderTopK", "k": config["k"]}
        tensors = linear | {
            "encoder.bias": weights["b_enc"],
            "b_dec": weights["b_dec"],
            "k": torch.tensor(config["k"], dtype=torch.int32),
            "threshold": torch.tensor(-1.0),
        }
    elif architecture == "jumprelu":
        trainer["dict_class"] = "JumpReluAutoEncoder"
        tensors = dict(weights)
        if config["apply_b_dec_to_input"]:  # theirs does not: (x - b) W + c = x W + (c - b W)
            tensors["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    elif architecture == "gated":
        trainer["dict_class"] = "GatedAutoEncoder"
        tensors = linear | {
            "decoder_bias": weights["b_dec"],
            "gate_bias": weights["b_gate"],
            "mag_bias": weights["b_mag"],
            "r_mag": weights["r_mag"],
        }
    else:
        raise ValueError(
            "dictionary_learning holds standard, topk, jumprelu and gated SAEs, got architecture "
            f"{architecture!r}"
        )
    with replacing_together(path) as temporary:
        text = json.dumps({"trainer": trainer, "buffer": {}}, indent=2)
        (temporary / CONFIG).write_text(text + "\n")
        torch.save({k: t.contiguous() for k, t in tensors.items()}, temporary / WEIGHTS)
