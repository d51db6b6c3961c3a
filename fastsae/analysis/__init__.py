"""Looking at a trained SAE."""

from fastsae.analysis.plots import plot_run as plot_run
from fastsae.analysis.top_tokens import Example as Example
from fastsae.analysis.top_tokens import top_tokens as top_tokens
