"""Where Neuronpedia shows a latent. Links are made, nothing is fetched."""

import json
from collections.abc import Sequence
from urllib.parse import quote, urlencode

from fastsae.saes import SAE

DOMAIN = "https://www.neuronpedia.org"


def neuronpedia_url(sae: SAE, latent: int) -> str:
    """Page of a latent.

    Raises:
        ValueError: the SAE has no `neuronpedia_id`, or no such latent.
    """
    return f"{DOMAIN}/{'/'.join(_place(sae, [latent]))}/{latent}"


def get_neuronpedia_quick_list(
    sae: SAE, features: Sequence[int], name: str = "temporary_list"
) -> str:
    """Page with a list of latents; SAELens's opens it in a browser as well.

    Raises:
        ValueError: the SAE has no `neuronpedia_id`, or no such latent.
    """
    model, layer = _place(sae, features)
    latents = [{"modelId": model, "layer": layer, "index": str(latent)} for latent in features]
    query = urlencode({"name": name, "features": json.dumps(latents)}, quote_via=quote)
    return f"{DOMAIN}/quick-list/?{query}"


def _place(sae: SAE, latents: Sequence[int]) -> tuple[str, str]:
    """Model and layer of `neuronpedia_id`, such as gpt2-small and 8-res-jb."""
    found = sae.cfg.metadata.get("neuronpedia_id")
    if found is None or str(found).count("/") != 1:
        raise ValueError(
            "sae must have a neuronpedia_id such as gpt2-small/8-res-jb in its metadata, got "
            f"{found!r}: it comes with a release of SAELens's directory that Neuronpedia shows"
        )
    for latent in latents:
        if not 0 <= latent < sae.cfg.d_sae:
            raise ValueError(f"latent must be in [0, F) with F = {sae.cfg.d_sae}, got {latent}")
    model, layer = str(found).split("/")
    return model, layer
