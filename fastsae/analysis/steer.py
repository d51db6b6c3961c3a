"""Push a language model along a latent's direction, wherever it runs from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastsae.data.hooks import resolve_hook, splice
from fastsae.data.language_model import LanguageModel
from fastsae.saes import SAE


@contextmanager
def steer(
    model: Any, sae: SAE, latent: int, strength: float, *, hook: str | None = None
) -> Iterator[None]:
    """Inside this context every forward pass, those of `generate` too, has steered activations.

    x + strength W_dec[latent] / |W_dec[latent]| takes the place of x at the SAE's hook, at every
    position. Turner et al. 2023 (arXiv 2308.10248); with SAE latents: Templeton et al. 2024.

    Args:
        model: a LanguageModel of fastsae, a plain Hugging Face model, or a HookedTransformer or
            TransformerBridge of TransformerLens.
        latent: 0 <= latent < F.
        strength: length of what is added, in the units of the activations.
        hook: where; None: the SAE's own, of its metadata. A transcoder writes at `hook_name_out`.

    Raises:
        ValueError: the latent is out of range, or the model has no such hook.
    """
    if not 0 <= latent < sae.cfg.d_sae:
        raise ValueError(f"latent must be in [0, F) with F = {sae.cfg.d_sae}, got {latent}")
    metadata = sae.cfg.metadata
    name = hook or metadata.get("hook_name_out") or metadata.get("hook_name")
    if name is None:
        raise ValueError(
            "hook must be given for an SAE without hook_name in its metadata, got None"
        )
    row = sae.W_dec[latent].detach()
    push = strength * row / row.norm()

    def steered(x: Tensor) -> Tensor:
        return x + push.to(x).reshape(x.shape[-1:] if x.shape[-1] == len(push) else x.shape[-2:])

    points = getattr(model, "hook_dict", None)
    if points is None:
        no_tokenizer: Any = None
        lm = model if isinstance(model, LanguageModel) else LanguageModel("", model, no_tokenizer)
        with splice(lm, resolve_hook(lm, name), steered):
            yield
        return
    if name not in points:
        raise ValueError(f"hook must be a hook point of the model, got {name!r}")
    handle = points[name].register_forward_hook(lambda _module, _args, x: steered(x))
    try:
        yield
    finally:
        handle.remove()
