"""SAELens's names with SAELens's defaults: `from fastsae.sae_lens import ...`."""
