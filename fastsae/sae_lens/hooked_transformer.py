"""`HookedSAETransformer`: TransformerLens's HookedTransformer, which ended with version 3."""

try:
    from transformer_lens import HookedTransformer
except ImportError as error:
    raise ImportError(
        "HookedSAETransformer needs transformer-lens < 4, which has HookedTransformer; with a "
        "later one use SAETransformerBridge.boot_transformers(name)"
    ) from error

from fastsae.sae_lens.hosts import HostsSAEs


class HookedSAETransformer(HostsSAEs, HookedTransformer):
    """A HookedTransformer that carries SAEs; every constructor of it makes one of these."""
