"""Qwen Scope: one `layer{n}.sae.pt` a layer, with W_enc [F, D] and W_dec [D, F].

acts = the k largest of relu(x W_enc^T + b_enc), x_hat = acts W_dec^T + b_dec. The name of the
repository alone states k, `SAE-Res-{model}-W{F / 1024}K-L0_{k}`: keep it in the path of a local
copy.
"""

import re
from pathlib import Path

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_tensors

FILE = re.compile(r"layer(\d+)\.sae\.pt")
REPOSITORY = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")


def matches(path: Path) -> bool:
    return path.is_file() and FILE.fullmatch(path.name) is not None


def read(path: Path) -> Checkpoint:
    layer, repository = FILE.fullmatch(path.name), REPOSITORY.search(path.as_posix())
    assert layer is not None
    if repository is None:
        raise ValueError(
            "path must have a folder called SAE-Res-MODEL-W..K-L0_K, which states the k of Qwen "
            f"Scope's SAEs, got {path}"
        )
    tensors = read_tensors(path)
    W_enc, b_enc, W_dec, b_dec = pick(tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), path)
    return checkpoint(
        "topk",
        {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec.t(), "b_dec": b_dec},
        {
            "model_name": f"Qwen/{repository[1]}",
            "hook_name": f"blocks.{layer[1]}.hook_resid_post",
            "hf_hook_name": f"model.layers.{layer[1]}",
            "prepend_bos": True,
            "context_size": 1024,
        },
        k=int(repository[2]),
        apply_b_dec_to_input=False,
        rescale_acts_by_decoder_norm=False,
    )
