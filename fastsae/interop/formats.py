"""The one list of checkpoint formats: name -> module with `matches`, `read` and maybe `write`."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from fastsae.interop import (
    dictionary_learning,
    gemma_scope,
    gpt2_attention,
    in_training,
    layer_transcoders,
    linear_layers,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    temporal,
)
from fastsae.interop.checkpoint import Checkpoint
from fastsae.saes import SAE
from fastsae.saes.native_format import build_sae

FORMATS: Mapping[str, ModuleType] = {
    "in_training": in_training,  # looks like SAELens's, but for what lies beside it
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "llama_scope": llama_scope,
    "temporal": temporal,
    "qwen_scope": qwen_scope,
    "layer_transcoders": layer_transcoders,
    "gpt2_attention": gpt2_attention,
    # The last two look into the file.
    "openai": openai,
    "linear_layers": linear_layers,
}
WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "write"))


def detect(path: Path) -> str:
    """The name of the format of what is at `path`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is in none of the formats.
    """
    for name, module in FORMATS.items():
        if module.matches(path):
            return name
    if not path.exists():
        raise FileNotFoundError(f"path must be a checkpoint, got {path} and nothing there")
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "another kind of file"
    raise ValueError(f"path must be in one of the formats {list(FORMATS)}, got {path}: {found}")


def load_checkpoint(path: Path) -> Checkpoint:
    """What is at `path`, whatever its format."""
    return FORMATS[detect(path)].read(path)


def load_sae(path: Path | str, device: torch.device | str = "cpu") -> SAE:
    """The SAE at `path`, whatever its format.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the format is unknown, or a file is damaged or lacks what the format needs.
    """
    path = Path(path)
    return build_sae(*load_checkpoint(path), device=device, source=str(path))


def save_checkpoint_as(sae: SAE, path: Path, to: str) -> None:
    """Write an SAE in another format.

    Raises:
        ValueError: the format cannot be written, or cannot hold this SAE.
    """
    if to not in WRITABLE:
        raise ValueError(f"to must be one of {list(WRITABLE)}, got {to!r}")
    weights = {name: t.detach().cpu() for name, t in sae.state_dict().items()}
    FORMATS[to].write(Checkpoint(sae.cfg.to_dict(), weights), path)
