"""Where activations come from: language models, text, hooks, harvested rows."""

from fastsae.data.activations import Activations, RowFilter, harvest, harvest_all
from fastsae.data.hooks import HookPoint, capture, d_at, resid_hook_name, resolve_hook, splice
from fastsae.data.language_model import LanguageModel, load_language_model
from fastsae.data.text import Text, load_text, split_documents
from fastsae.data.tokens import tokenize

__all__ = [
    "Activations",
    "HookPoint",
    "LanguageModel",
    "RowFilter",
    "Text",
    "capture",
    "d_at",
    "harvest",
    "harvest_all",
    "load_language_model",
    "load_text",
    "resid_hook_name",
    "resolve_hook",
    "splice",
    "split_documents",
    "tokenize",
]
