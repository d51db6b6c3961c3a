"""SAELens's folders of the versions before 6, whose `cfg.json` was flat."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Without a version of at least 6 SAELens reads the file as an older format and drops its metadata.
FORMAT_VERSION = "6.54.12"
METADATA = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "hook_layer",
    "hook_head_index",
    "exclude_special_tokens",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_training_version",
)
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""What a version before 6 called it -> what later ones did."""


def is_of_version_6(config: dict[str, Any]) -> bool:
    """Whether a cfg.json says so; one that says nothing but has `metadata` is taken for one."""
    metadata = config.get("metadata") or {}
    stated = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if stated is None:
        return not set(config) & {*RENAMED, *METADATA, "activation_fn"}
    return int(str(stated).partition(".")[0]) >= 6


def from_before_6(
    config: dict[str, Any], weights: dict[str, Tensor], source: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same in version 6's names."""
    from fastsae.saes import SAES

    old = {RENAMED.get(name, name): value for name, value in config.items()}
    architecture = old.get("architecture") or "standard"
    new: dict[str, Any] = {"architecture": architecture}
    if old.get("activation_fn") == "topk":
        k = (old.get("activation_fn_kwargs") or {}).get("k")
        if k is None:
            raise ValueError(f"{source} must have activation_fn_kwargs.k, got none")
        new |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
    if new["architecture"] not in SAES:
        raise ValueError(
            f"architecture must be one of {sorted(SAES)}, got {new['architecture']!r} in {source}"
        )
    normalize = old.get("normalize_activations") or "none"
    if isinstance(normalize, bool):
        normalize = "expected_average_only_in"
    weights = dict(weights)
    scaling = weights.pop("scaling_factor", None)
    if scaling is not None and not torch.all(scaling == 1):
        raise ValueError(
            f"scaling_factor must be all ones, got others in {source}: its SAE was saved "
            "in the middle of a fine-tuning that no later version does"
        )
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    known = {f.name for f in fields(SAES[new["architecture"]].config_class)} - {"metadata"}
    new |= {k: v for k, v in old.items() if k in known and k not in new and v is not None}
    new["normalize_activations"] = normalize
    if "dtype" in new:
        new["dtype"] = str(new["dtype"]).removeprefix("torch.")
    if "hook_z" in str(old.get("hook_name", "")):
        new["reshape_activations"] = "hook_z"
    metadata = {name: old[name] for name in METADATA if old.get(name) is not None}
    new["metadata"] = {"sae_lens_version": FORMAT_VERSION, **metadata}
    return new, weights
