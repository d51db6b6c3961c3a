"""Who has not fired for a while, counted in tokens, without a dense tensor."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DeadLatents:
    """For each latent, the tokens since it last fired and the tokens it ever fired on.

    Args:
        anywhere: of a 0-dim bool, whether it holds for any holder of latents.
    """

    def __init__(
        self,
        d_sae: int,
        window: int,
        device: torch.device,
        anywhere: Callable[[Tensor], Tensor] = lambda here: here,
    ) -> None:
        self.window, self._anywhere = window, anywhere
        self.since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0
        self._watch()

    def update(self, counts: Int[Tensor, " F"], n_tokens: int) -> None:
        """Count a batch of `n_tokens` on which each latent fired `counts` times."""
        self.since_fired.add_(n_tokens).masked_fill_(counts > 0, 0)
        self.fired.add_(counts)
        self.tokens += n_tokens
        self._watch()

    def any(self) -> bool:
        """Whether a latent is dead: known since the last update, so that nobody waits for it."""
        if self._version != self.since_fired._version:
            self._watch()
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._any)

    def _watch(self) -> None:
        """Have the answer of `any` on its way to the host."""
        self._any, self._arrived = self._anywhere(self.dead().any()), None
        self._version = self.since_fired._version
        if self._any.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._any = on_host.copy_(self._any, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def dead(self) -> Bool[Tensor, " F"]:
        return self.since_fired > self.window

    def start_again(self, latents: Int[Tensor, " n"]) -> None:
        """These were given new weights: they are alive for a window."""
        self.since_fired[latents] = 0

    def state_dict(self) -> dict[str, Tensor]:
        tokens = torch.tensor(self.tokens)
        return {"since_fired": self.since_fired, "fired": self.fired, "tokens": tokens}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.since_fired.copy_(state["since_fired"])
        self.fired.copy_(state["fired"])
        self.tokens = int(state["tokens"])
