"""`SAE`, as SAELens's users load it: with hook points, from a folder or a release."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.formats import load_checkpoint
from fastsae.interop.pretrained import Converter, Pretrained, from_pretrained, in_dtype
from fastsae.sae_lens.hooked_sae import HookedSAE, hooked
from fastsae.saes import SAE as CoreSAE
from fastsae.saes import SAEConfig
from fastsae.saes.native_format import build_sae
from fastsae.saes.older_format import from_before_6, is_of_version_6

TrainingSAEConfig = SAEConfig
"""One configuration trains and is used."""
Dtype = str | torch.dtype | None
DiskConverter = Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]
"""SAELens's kind of loader: (path, device, cfg_overrides) -> configuration and tensors."""


class SAE(HookedSAE):
    """The names under which SAELens loads an SAE; what they return is an SAE with hook points."""

    @staticmethod
    def from_pretrained(
        release: str,
        sae_id: str,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        force_download: bool = False,
        converter: Converter | None = None,
        fold_W_dec_norm: bool = False,
    ) -> Any:
        """The SAE of a release; unpacks to (sae, cfg_dict, log10 sparsity or None) as well.

        See `fastsae.interop.pretrained.from_pretrained` for the arguments.
        """
        found = _load(release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm)
        return _unpackable(found)

    @staticmethod
    def from_pretrained_with_cfg_and_sparsity(
        release: str,
        sae_id: str,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        force_download: bool = False,
        converter: Converter | None = None,
        fold_W_dec_norm: bool = False,
    ) -> tuple[CoreSAE, dict[str, Any], Tensor | None]:
        """The SAE, its cfg.json, and log10 of its latents' firing frequencies where published."""
        found = _load(release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm)
        return found.sae, found.config, found.log_sparsity

    @staticmethod
    def load_from_disk(
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: Dtype = None,
        converter: DiskConverter | None = None,
        fold_W_dec_norm: bool = False,
    ) -> CoreSAE:
        """The SAE at `path`, in SAELens's format or any that `fastsae convert` reads.

        Args:
            dtype: of the parameters; None: that of the file.
            converter: reads a folder of a kind that is not known here.
        """
        if converter is None:
            config, weights = load_checkpoint(Path(path))
        else:
            config, weights = converter(path, str(device), {})
            if not is_of_version_6(config):
                config, weights = from_before_6(config, weights, source=Path(path))
        sae = build_sae(config, weights, device, source=str(path))
        if fold_W_dec_norm:
            sae.fold_W_dec_norm()
        return hooked(sae if dtype is None else in_dtype(sae, dtype))

    @staticmethod
    def load_from_pretrained(
        path: str | Path, device: torch.device | str = "cpu", dtype: Dtype = None
    ) -> CoreSAE:
        """The older name of `load_from_disk`."""
        warnings.warn(
            "load_from_pretrained is an older name: use load_from_disk",
            DeprecationWarning,
            stacklevel=2,
        )
        return SAE.load_from_disk(path, device, dtype)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> CoreSAE:
        """A new SAE of a configuration as cfg.json holds it.

        Raises:
            ValueError: the architecture is unknown, or a field breaks its rule.
        """
        from fastsae.saes import SAES

        architecture = config.get("architecture")
        if architecture not in SAES:
            raise ValueError(f"architecture must be one of {sorted(SAES)}, got {architecture!r}")
        kind = SAES[architecture]
        return hooked(kind(kind.config_class.from_dict(config), device=config.get("device", "cpu")))


def _load(
    release: str,
    sae_id: str,
    device: torch.device | str,
    dtype: Dtype,
    force_download: bool,
    converter: Converter | None,
    fold_W_dec_norm: bool,
) -> Pretrained:
    found = from_pretrained(
        release,
        sae_id,
        device=device,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        force_download=force_download,
        converter=converter,
        fold_W_dec_norm=fold_W_dec_norm,
    )
    return found._replace(sae=hooked(found.sae))


def _unpackable(found: Pretrained) -> CoreSAE:
    """The SAE, from which iterating and indexing take what SAELens before 6 returned."""
    sae = found.sae
    kind = type(sae)
    # The class is the SAE's own, so that the tuple lives no longer than the SAE.
    unpacking = {
        "__iter__": lambda self: iter((self, found.config, found.log_sparsity)),
        "__getitem__": lambda self, i: (self, found.config, found.log_sparsity)[i],
        "__module__": __name__,
    }
    sae.__class__ = type(kind.__name__, (kind,), unpacking)
    return sae
