"""TransformerLens's models as language models: their hook names, their forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsae.data.language_model import LanguageModel
from fastsae.extras import require

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:
    TransformerBridge = Any


def as_language_model(model: Any) -> LanguageModel:
    """Whatever holds a language model, to harvest from and to splice into.

    Args:
        model: a `LanguageModel`, a TransformerBridge, a HookedTransformer or a Hugging Face model,
            whose tokenizer is loaded by the model's name.

    Raises:
        TypeError: none of these.
    """
    if isinstance(model, LanguageModel):
        return model
    if hasattr(model, "original_model"):
        return from_bridge(model)
    if hasattr(model, "hook_dict") and hasattr(model, "unembed"):
        return from_hooked_transformer(model)
    if hasattr(model, "get_input_embeddings") and hasattr(model, "name_or_path"):
        tokenizers = require("transformers", extra="train").AutoTokenizer
        tokenizer = tokenizers.from_pretrained(model.name_or_path)
        return LanguageModel(name=model.name_or_path, model=model.eval(), tokenizer=tokenizer)
    raise TypeError(
        "model must be a HookedTransformer, a TransformerBridge, a Hugging Face model or a "
        f"LanguageModel, got {type(model).__name__}"
    )


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


def from_hooked_transformer(hooked: Any) -> LanguageModel:
    """A HookedTransformer under Hugging Face's calling convention; its hook names resolve.

    Activations are those of the weights as TransformerLens has processed them.
    """
    adapter: Any = _HookedAdapter(hooked)
    hooks = {name: f"hooked.{name}" for name in hooked.hook_dict}
    return LanguageModel(
        name=hooked.cfg.model_name, model=adapter, tokenizer=hooked.tokenizer, hooks=hooks
    )


class _HookedAdapter(nn.Module):
    """`model(input_ids=...)` gives `.logits`."""

    def __init__(self, hooked: Any) -> None:
        super().__init__()
        self.hooked = hooked
        cfg = hooked.cfg
        text = SimpleNamespace(
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            vocab_size=cfg.d_vocab,
            max_position_embeddings=cfg.n_ctx,
        )
        self.config = SimpleNamespace(get_text_config=lambda: text)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hooked.parameters()).dtype

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.hooked(input_ids, return_type="logits"))
