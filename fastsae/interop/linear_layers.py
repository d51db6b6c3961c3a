"""Two linear layers in one `.pt` or `.pth` file: Goodfire's SAEs and qresearch's of DeepSeek-R1.

acts = relu(x W_enc + b_enc), x_hat = acts W_dec + b_dec. The layer is read off the file's name.
"""

import re
from pathlib import Path
from typing import Any

from fastsae.interop.checkpoint import Checkpoint, checkpoint, pick, read_tensors

PREFIXES = ("encoder_linear.", "encoder.")
MODELS = {
    "Llama-3.3-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "DeepSeek-R1-Distill-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


def matches(path: Path) -> bool:
    if not (path.is_file() and path.suffix in (".pt", ".pth")):
        return False
    tensors = read_tensors(path)
    return set(_names(tensors)) <= set(tensors)


def read(path: Path) -> Checkpoint:
    tensors = read_tensors(path)
    W_enc, b_enc, W_dec, b_dec = pick(tensors, _names(tensors), path)
    metadata: dict[str, Any] = {"dataset_path": "lmsys/lmsys-chat-1m"}
    layer = re.search(r"-l(\d+)$", path.stem)
    if layer is not None:
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    model = [name for start, name in MODELS.items() if path.name.startswith(start)]
    metadata |= {"model_name": model[0]} if model else {}
    return checkpoint(
        "standard",
        {"W_enc": W_enc.t(), "b_enc": b_enc, "W_dec": W_dec.t(), "b_dec": b_dec},
        metadata,
        apply_b_dec_to_input=False,
    )


def _names(tensors: dict[str, Any]) -> list[str]:
    encoder = PREFIXES[0] if f"{PREFIXES[0]}weight" in tensors else PREFIXES[1]
    decoder = encoder.replace("encoder", "decoder")
    return [f"{layer}{kind}" for layer in (encoder, decoder) for kind in ("weight", "bias")]
