"""`SAETransformerBridge`: TransformerLens 3's and 4's bridge, with SAEs."""

from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from fastsae.sae_lens.hosts import HostsSAEs


class SAETransformerBridge(HostsSAEs, TransformerBridge):
    """A TransformerBridge that carries SAEs."""

    @classmethod
    def boot_transformers(cls, *args: Any, **kwargs: Any) -> "SAETransformerBridge":
        """As TransformerBridge's."""
        bridge = TransformerBridge.boot_transformers(*args, **kwargs)
        bridge.__class__ = cls
        assert isinstance(bridge, cls)
        return bridge
