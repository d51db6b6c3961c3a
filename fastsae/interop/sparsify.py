"""EleutherAI sparsify: a folder with `cfg.json` and `sae.safetensors`.

acts = the k largest of relu((x - b_dec) W_enc + b_enc), x_hat = acts W_dec + b_dec; a transcoder
(`transcode`) does not subtract b_dec. W_dec has one latent a row on disk.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastsae.files import replacing_together
from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    config, source = read_json(path / CONFIG), path / WEIGHTS
    if config.get("activation", "topk") != "topk" or config.get("skip_connection"):
        raise ValueError(
            f"{path / CONFIG} must have activation 'topk' and no skip_connection, got "
            f"{config.get('activation')!r} and {config.get('skip_connection')!r}"
        )
    tensors = read_tensors(source)
    W_enc, b_enc, W_dec, b_dec = pick(
        tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), source
    )
    if W_dec.shape[1] != W_enc.shape[1]:
        raise ValueError(
            f"{source} must hold an autoencoder, got rows of {W_enc.shape[1]} in and "
            f"{W_dec.shape[1]} out"
        )
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return checkpoint(
        "topk",
        weights,
        {"hook_name": path.name} if "layers" in path.name else {},
        k=pick(config, ["k"], path / CONFIG)[0],
        apply_b_dec_to_input=not config.get("transcode", False),
        rescale_acts_by_decoder_norm=False,
    )


def write(made: Checkpoint, path: Path) -> None:
    config, weights = made
    if config["architecture"] != "topk":
        raise ValueError(f"sparsify holds topk SAEs, got architecture {config['architecture']!r}")
    if config.get("rescale_acts_by_decoder_norm"):
        norms = weights["W_dec"].norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
            raise ValueError(
                "W_dec must have unit rows to be written for sparsify, which does not rank by "
                f"decoder norms; got norms from {float(norms.min()):.3g} to "
                f"{float(norms.max()):.3g}: call fold_W_dec_norm first"
            )
    fields = {
        "activation": "topk",
        "expansion_factor": config["d_sae"] // config["d_in"],
        "normalize_decoder": False,
        "num_latents": config["d_sae"],
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": not config["apply_b_dec_to_input"],
        "d_in": config["d_in"],
    }
    tensors = {
        "encoder.weight": weights["W_enc"].t(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    with replacing_together(path) as temporary:
        (temporary / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary / WEIGHTS)
