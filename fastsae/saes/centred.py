"""SAEs of a residual stream without its mean, inside models whose residual stream has one.

TransformerLens's `center_writing_weights` takes the mean over D off all that is written to the
residual stream, which layer norm takes off anyway: x becomes x - mean(x). An SAE trained on such
rows says so in `model_from_pretrained_kwargs`, and is wrong by the mean on the published model.
"""

from typing import Any

from torch import Tensor, nn

WRITTEN = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def expects_centred_rows(metadata: dict[str, Any]) -> bool:
    """Whether an SAE was trained on rows of the residual stream, or written to it, that were
    centred."""
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    written = str(metadata.get("hook_name")).endswith(WRITTEN)
    return bool(kwargs.get("center_writing_weights")) and written


def takes_centred_rows(metadata: dict[str, Any], model: nn.Module) -> bool:
    """Whether an SAE is to be given this model's rows without their means."""
    return expects_centred_rows(metadata) and has_layer_norm(model)


def has_layer_norm(model: nn.Module) -> bool:
    """Whether centring leaves the model's predictions alone; RMS norm would notice it."""
    return any(type(m).__name__.startswith("LayerNorm") for m in model.modules())


def mean_of(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)
