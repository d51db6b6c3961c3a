"""`SAE`, as SAELens's users load it: with hook points, from a folder or a release."""

from pathlib import Path
from typing import Any

import torch

from fastsae.interop.formats import load_sae
from fastsae.interop.pretrained import from_pretrained
from fastsae.sae_lens.hooked_sae import HookedSAE, hooked
from fastsae.saes import SAE as CoreSAE


class SAE(HookedSAE):
    """The names under which SAELens loads an SAE; what they return is an SAE with hook points."""

    @staticmethod
    def from_pretrained(release: str, sae_id: str, device: torch.device | str = "cpu") -> Any:
        """The SAE of a release; unpacks to (sae, cfg_dict, log10 sparsity or None) as well."""
        sae, config, sparsity = from_pretrained(release, sae_id, device=device)
        return _unpackable(hooked(sae), config, sparsity)

    @staticmethod
    def from_pretrained_with_cfg_and_sparsity(
        release: str, sae_id: str, device: torch.device | str = "cpu"
    ) -> tuple[CoreSAE, dict[str, Any], torch.Tensor | None]:
        """The SAE, its cfg.json, and log10 of its latents' firing frequencies where published."""
        sae, config, sparsity = from_pretrained(release, sae_id, device=device)
        return hooked(sae), config, sparsity

    @staticmethod
    def load_from_disk(path: str | Path, device: torch.device | str = "cpu") -> CoreSAE:
        """The SAE at `path`, in SAELens's format or any that `fastsae convert` reads."""
        return hooked(load_sae(path, device))


def _unpackable(sae: CoreSAE, config: dict[str, Any], sparsity: torch.Tensor | None) -> CoreSAE:
    kind = type(sae)
    unpacking = {"__iter__": lambda self: iter((self, config, sparsity)), "__module__": __name__}
    sae.__class__ = type(kind.__name__, (kind,), unpacking)
    return sae
