"""Links to Neuronpedia's pages of a published SAE's latents."""

import json
from collections.abc import Sequence
from urllib.parse import quote

from fastsae.saes import SAE

DOMAIN = "https://www.neuronpedia.org"


def neuronpedia_url(sae: SAE, latent: int) -> str:
    """The page of a latent.

    Raises:
        ValueError: the latent is out of range, or the SAE has no page there.
    """
    if not 0 <= latent < sae.cfg.d_sae:
        raise ValueError(f"latent must be in [0, F) with F = {sae.cfg.d_sae}, got {latent}")
    return f"{DOMAIN}/{_neuronpedia_id(sae)}/{latent}"


def neuronpedia_quick_list(sae: SAE, latents: Sequence[int], name: str = "temporary_list") -> str:
    """A page with several latents of an SAE.

    Raises:
        ValueError: the SAE has no page there.
    """
    model, layer = _neuronpedia_id(sae).split("/")[:2]
    listed = [{"modelId": model, "layer": layer, "index": str(latent)} for latent in latents]
    return f"{DOMAIN}/quick-list/?name={quote(name)}&features={quote(json.dumps(listed))}"


def _neuronpedia_id(sae: SAE) -> str:
    found = sae.cfg.metadata.get("neuronpedia_id")
    if found is None:
        raise ValueError(
            "sae must name its page in cfg.metadata.neuronpedia_id, as SAEs of SAELens's releases "
            "do, got None"
        )
    return str(found)
