"""One SAE at its place in a model: what it reads there, and what it leaves in its stead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.sae_lens.hooked_sae import HookedSAE
from fastsae.saes.centred import mean_of


class Attached:
    """An SAE, or a transcoder, in the way of an activation.

    Args:
        use_error_term: add what the SAE misses, so that the model computes as without it.
        centred: hand rows over without their means, which are put back afterwards.
        tokens: the ids of the forward pass, where `excluded` is not empty.
        excluded: ids at whose positions the activation stays what it was.
    """

    def __init__(
        self,
        sae: HookedSAE,
        *,
        use_error_term: bool,
        centred: bool,
        excluded: tuple[int, ...] = (),
        tokens: Callable[[], Tensor] | None = None,
    ) -> None:
        self.sae = sae
        self.use_error_term = use_error_term
        self.centred = centred
        self.excluded = excluded
        self.handles: list[Any] = []
        self._tokens = tokens
        self._read: list[Tensor] = []

    def read(self, x: Tensor) -> None:
        """What a transcoder starts from."""
        self._read[:] = [x]

    def write(self, original: Tensor) -> Tensor:
        """What goes on in the place of `original`."""
        sae = self.sae
        shift = mean_of(original) if self.centred else torch.zeros((), dtype=original.dtype)
        target = original - shift.to(original)
        x = self._read.pop() if self._read else target
        y = sae.reconstruct(x).reshape(target.shape)
        if self.use_error_term:
            y = y + sae.hook_sae_error(sae.missed(x, target))
        if self._tokens is not None and self.excluded:
            kept = torch.isin(self._tokens(), torch.tensor(self.excluded, device=y.device))
            y = torch.where(kept.reshape(*kept.shape, *[1] * (y.ndim - kept.ndim)), target, y)
        return sae.hook_sae_output(y).to(original.dtype) + shift.to(original)
