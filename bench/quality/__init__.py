"""Quality of the trained SAE at equal tokens: ours with its defaults against SAELens."""
