"""The tokens on which a latent is most active, with their context."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.data import Activations, LanguageModel
from fastsae.data.batches import CHUNK_ROWS
from fastsae.saes import SAE


@dataclass(frozen=True)
class Example:
    """One activation of a latent."""

    act: float
    before: str
    token: str
    after: str


@torch.no_grad()
def top_tokens(
    sae: SAE,
    lm: LanguageModel,
    activations: Activations,
    latents: Int[Tensor, " n"],
    *,
    n_examples: int = 5,
    window: int = 8,
) -> dict[int, list[Example]]:
    """For each latent the examples with the largest acts, at most one a context.

    Args:
        latents: which latents.
        n_examples: examples a latent; fewer where it fires less often.
        window: tokens of context on either side.
    """
    acts = latent_acts(sae, activations.rows, latents)
    found: dict[int, list[Example]] = {}
    for column, latent in enumerate(latents.tolist()):
        examples: list[Example] = []
        seen: set[int] = set()
        for row in acts[:, column].argsort(descending=True).tolist():
            if len(examples) == n_examples or acts[row, column] <= 0:
                break
            context = int(activations.context_of[row])
            if context not in seen:
                seen.add(context)
                position = int(activations.position_of[row])
                tokens = activations.tokens[context].tolist()
                text = lambda part: str(lm.tokenizer.decode(part))
                examples.append(
                    Example(
                        float(acts[row, column]),
                        text(tokens[max(1, position - window) : position]),
                        text(tokens[position : position + 1]),
                        text(tokens[position + 1 : position + 1 + window]),
                    )
                )
        found[latent] = examples
    return found


def latent_acts(
    sae: SAE, rows: Float[Tensor, "N D"], latents: Int[Tensor, " n"]
) -> Float[Tensor, "N n"]:
    """Acts of a few latents on all rows, without dense acts of the others kept."""
    parts = [sae.encode(x.to(sae.device, sae.dtype))[:, latents] for x in rows.split(CHUNK_ROWS)]
    return torch.cat(parts).cpu()


def interesting_latents(density: Float[Tensor, " F"], n: int, seed: int = 0) -> Int[Tensor, " n"]:
    """A few latents that fire neither rarely nor everywhere: 1 token in 10,000 to 1 in 100."""
    middling = ((density > 1e-4) & (density < 1e-2)).nonzero().squeeze(1)
    pool = middling if len(middling) >= n else density.argsort(descending=True)[: max(n, 1)]
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:n]].sort().values
