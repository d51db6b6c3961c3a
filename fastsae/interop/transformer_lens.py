"""TransformerLens's bridge as a language model: its hook names, its forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastsae.data.language_model import LanguageModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:
    TransformerBridge = Any


def from_bridge(bridge: TransformerBridge) -> LanguageModel:
    """The model inside a `TransformerBridge`, to harvest from and to splice into.

    Every hook of the bridge resolves under the bridge's names, such as `blocks.15.hook_resid_post`,
    and hooks that were put on the bridge act on the model as well. The bridge is not changed.

    Raises:
        TypeError: `bridge` has no model inside.
        ValueError: the bridge is in training mode, where dropout would change activations.
    """
    model = getattr(bridge, "original_model", None)
    if model is None:
        raise TypeError(f"bridge must be a TransformerBridge, got {type(bridge).__name__}")
    if model.training:
        raise ValueError("bridge must be in eval mode, got training mode; call bridge.eval()")
    path_of = {module: path for path, module in model.named_modules()}
    hooks = {name: path_of[hook] for name, hook in bridge.hook_dict.items() if hook in path_of}
    return LanguageModel(
        name=bridge.cfg.model_name, model=model, tokenizer=bridge.tokenizer, hooks=hooks
    )
