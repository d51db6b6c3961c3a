"""`fastsae convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.interop.formats import detect, load_sae, save_checkpoint_as

Writable = Literal["saelens", "sparsify", "dictionary_learning", "openai"]


@dataclass(frozen=True)
class Convert:
    """Write a saved SAE in another library's format."""

    source: Path
    """Folder or file; its format is detected."""
    destination: Path
    """Folder to write (a .pt file for openai)."""
    to: Writable = "saelens"
    """Format of the destination."""
    fold_W_dec_norm: bool = False
    """Give the decoder unit rows first, the encoder their norms."""


def convert(args: Convert) -> str:
    """Convert, and say what was done in one line.

    Raises:
        FileExistsError: the destination is there already.
        FileNotFoundError: the source is not.
        ValueError: the source is in no known format, or the destination's cannot hold it.
    """
    if args.destination.exists() and (
        args.destination.is_file() or any(args.destination.iterdir())
    ):
        raise FileExistsError(f"destination must be new, got {args.destination}")
    found = detect(args.source)
    sae = load_sae(args.source)
    if args.fold_W_dec_norm:
        sae.fold_W_dec_norm()
    save_checkpoint_as(sae, args.destination, args.to)
    shape = f"{sae.cfg.architecture}, {sae.cfg.d_in} -> {sae.cfg.d_sae}"
    return f"{found} ({shape}) -> {args.to}: {args.destination}"
