"""EleutherAI sparsify: a folder with `cfg.json` and `sae.safetensors`.

acts = the k largest of relu((x - b_dec) W_enc + b_enc), x_hat = acts W_dec + b_dec; a transcoder
(`transcode`) does not subtract b_dec. W_dec has one latent a row on disk.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastsae.files import replacing_together
from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
HOOKPOINT = re.compile(r"(?:.+\.)?(?:layers|h)[._](\d+)(?:\.(mlp|self_attn|attn))?")
SITES = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attn": "hook_attn_out",
}


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
        _metadata(path),
        k=pick(config, ["k"], path / CONFIG)[0],
        apply_b_dec_to_input=not config.get("transcode", False),
        rescale_acts_by_decoder_norm=False,
    )


def _metadata(path: Path) -> dict[str, Any]:
    """What the folder's name, a module of the Hugging Face model, and the run's config.json say."""
    found: dict[str, Any] = {}
    layer = HOOKPOINT.fullmatch(path.name)
    if layer is not None:
        found = {"hook_name": f"blocks.{layer[1]}.{SITES[layer[2]]}", "hf_hook_name": path.name}
    elif path.name == "embed_tokens":
        found = {"hook_name": "hook_embed", "hf_hook_name": path.name}
    if (path.parent / "config.json").is_file():
        run = read_json(path.parent / "config.json")
        names = {"model_name": "model", "dataset_path": "dataset", "context_size": "ctx_len"}
        found |= {ours: run[theirs] for ours, theirs in names.items() if theirs in run}
    return found


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
