"""Which part of each tensor of an SAE a shard has."""

from collections.abc import Mapping

from torch import Tensor

from fastsae.saes import SAE


def latent_axis(sae: SAE, name: str) -> int | None:
    """Of a tensor of the SAE's state; None: it has none, and every shard has it whole."""
    if name in sae.WITHOUT_LATENT_AXIS:
        return None
    return 1 if name == "W_enc" else 0


def by_latent(name: str, t: Tensor) -> Tensor:
    """`t`, like the parameter `name`, with one latent a row; twice is `t` again."""
    return t.t() if name == "W_enc" and t.ndim == 2 else t


def whole_shape(sae: SAE, name: str, t: Tensor) -> list[int]:
    """Of what `t` is this shard's part of."""
    shape, axis = list(t.shape), latent_axis(sae, name)
    if axis is not None:
        shape[axis] = sae.cfg.d_sae
    return shape


def part_of_latents(sae: SAE, name: str, t: Tensor) -> Tensor:
    """This shard's part of a whole dictionary's tensor like the parameter `name`.

    What has one axis where the parameter has two is one number a latent.
    """
    axis = latent_axis(sae, name)
    if axis is None or t.ndim == 0:
        return t
    return t.narrow(min(axis, t.ndim - 1), sae.latents.start, len(sae.latents))


def shard_of(sae: SAE, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This shard's part of a whole dictionary's state."""
    return {name: part_of_latents(sae, name, t) for name, t in state.items()}
