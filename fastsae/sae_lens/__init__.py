"""SAELens's names: `from fastsae.sae_lens import SAE, HookedSAETransformer, ...`.

What needs TransformerLens is imported when it is asked for.
"""

import importlib
from typing import Any

_HOME = {
    "SAE": "fastsae.sae_lens.saes",
    "HookedSAE": "fastsae.sae_lens.hooked_sae",
    "hooked": "fastsae.sae_lens.hooked_sae",
    "HookedSAETransformer": "fastsae.sae_lens.hooked_transformer",
    "SAETransformerBridge": "fastsae.sae_lens.bridge",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)
