"""OpenAI's GPT-2 SAEs: one `.pt` file.

z = (x - mean x) / (std x + 1e-5) for TopK, z = x for ReLU; acts = the k largest of
relu((z - pre_bias) W_enc + latent_bias), or all of it; x_hat = (acts W_dec + pre_bias) std + mean.
"""

from pathlib import Path

import torch

from fastsae.files import replacing
from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_tensors

NAMES = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")


def matches(path: Path) -> bool:
    if not (path.is_file() and path.suffix == ".pt"):
        return False
    return set(NAMES) <= set(read_tensors(path))


def read(path: Path) -> Checkpoint:
    state = read_tensors(path)
    W_enc, b_enc, W_dec, b_dec = pick(state, NAMES, path)
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec.t(), "b_dec": b_dec}
    kind = str(state.get("activation", "ReLU"))
    if kind == "ReLU":
        return checkpoint("standard", weights, {})
    if kind != "TopK":
        raise ValueError(f"activation must be 'TopK' or 'ReLU', got {kind!r} in {path}")
    k = pick(pick(state, ["activation_state_dict"], path)[0], ["k"], path)[0]
    return checkpoint(
        "topk",
        weights,
        {},
        k=int(k),
        rescale_acts_by_decoder_norm=False,
        normalize_activations="layer_norm",
    )


def write(made: Checkpoint, path: Path) -> None:
    config, weights = made
    kinds = {("standard", "none"): "ReLU", ("topk", "layer_norm"): "TopK"}
    found = config["architecture"], config["normalize_activations"]
    if found not in kinds or config.get("rescale_acts_by_decoder_norm"):
        raise ValueError(
            "OpenAI's format holds standard SAEs, and topk SAEs with layer_norm and without "
            f"rescale_acts_by_decoder_norm, got {found[0]!r} with {found[1]!r}"
        )
    state = {
        "encoder.weight": weights["W_enc"].t().contiguous(),
        "latent_bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].t().contiguous(),
        "pre_bias": weights["b_dec"],
        "activation": kinds[found],
        "activation_state_dict": {"k": config["k"], "postact_fn": "ReLU"} if "k" in config else {},
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)
