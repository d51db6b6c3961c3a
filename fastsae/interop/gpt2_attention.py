"""Kissane and Conmy's SAEs of GPT-2's attention heads: `NAME.pt` with `NAME_cfg.json` beside it.

acts = relu((z - b_dec) W_enc + b_enc), x_hat = acts W_dec + b_dec, z the heads' outputs in a row.
"""

from pathlib import Path

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_json, read_tensors


def _config(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json")


def matches(path: Path) -> bool:
    return path.is_file() and path.suffix == ".pt" and _config(path).is_file()


def read(path: Path) -> Checkpoint:
    (hook,) = pick(read_json(_config(path)), ["act_name"], _config(path))
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": hook,
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "Skylion007/openwebtext",
    }
    W_enc, b_enc, W_dec, b_dec = pick(read_tensors(path), names, path)
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return checkpoint("standard", weights, metadata, reshape_activations="hook_z")
