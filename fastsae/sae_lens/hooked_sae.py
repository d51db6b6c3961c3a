"""SAEs with TransformerLens's hook points, under SAELens's names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from fastsae.sae_lens.neuronpedia import neuronpedia_url
from fastsae.saes import SAE

POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_output",
    "hook_sae_error",
)
T = TypeVar("T", bound=SAE)
Hook = Callable[..., Any]


class HookedSAE(SAE):
    """Mixed into an SAE: hook points on the way from x to x_hat.

    input -> pre-acts, before any rescaling by decoder norms -> acts -> recons -> output, all dense.
    While nobody listens to any of them the SAE computes as it always does, through sparse codes.
    """

    hook_sae_input: HookPoint
    hook_sae_acts_pre: HookPoint
    hook_sae_acts_post: HookPoint
    hook_sae_recons: HookPoint
    hook_sae_output: HookPoint
    hook_sae_error: HookPoint
    use_error_term: bool = False
    """Whether `forward` adds x - x_hat, as hook_sae_error leaves it, to what it returns."""

    def __init__(
        self, cfg: Any, use_error_term: bool = False, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(cfg, device=getattr(cfg, "device", "cpu") if device is None else device)
        self.add_points()
        self.use_error_term = use_error_term

    def add_points(self) -> None:
        self._lasting: list[Any] = []
        for name in POINTS:
            point = HookPoint()
            point.name = name
            setattr(self, name, point)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        return {name: getattr(self, name) for name in POINTS}

    def neuronpedia_url(self, latent: int) -> str:
        """Where Neuronpedia shows a latent; see `fastsae.sae_lens.neuronpedia`."""
        return neuronpedia_url(self, latent)

    def get_name(self) -> str:
        """Of the SAE in logs: sae_{model}_{hook}_{d_sae}."""
        metadata = self.cfg.metadata
        return f"sae_{metadata.get('model_name')}_{metadata.get('hook_name')}_{self.cfg.d_sae}"

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing is to be done: `hook_z` rows are taken with heads apart and flattened."""

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing is to be done: `hook_z` rows are taken with heads apart and flattened."""

    def listened_to(self) -> bool:
        """Whether any hook point has a hook."""
        return any(
            point._forward_hooks or point._backward_hooks or point._backward_pre_hooks
            for point in self.hook_dict.values()
        )

    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Dense acts, through the hook points where somebody listens."""
        if not self.listened_to():
            return super().encode(x)
        x = self.hook_sae_input(x)
        try:
            pre_acts = self.pre_acts(x)
        except NotImplementedError:  # matching pursuit has none
            acts = super().encode(x)
        else:
            acts = self.acts_of(self.hook_sae_acts_pre(pre_acts), x)
        return self.hook_sae_acts_post(acts)

    def _decode_dense(self, acts: Tensor) -> Tensor:
        return self.hook_sae_recons(super()._decode_dense(acts))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D_out"]:
        """decode(encode(x)), and what it misses where `use_error_term` is set."""
        x_hat = self.reconstruct(x)
        if self.use_error_term:
            x_hat = x_hat + self.hook_sae_error(self.missed(x, x))
        return self.hook_sae_output(x_hat)

    def reconstruct(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D_out"]:
        """decode(encode(x)), through the hook points on the way where somebody listens."""
        return self._reconstruct_aloud(x) if self.listened_to() else super().forward(x)

    @torch.no_grad()
    def missed(self, x: Float[Tensor, "... D"], target: Tensor) -> Tensor:
        """target - decode(encode(x)) as it is without hooks, of which none is called."""
        return target - super().forward(x).reshape(target.shape)

    def _reconstruct_aloud(self, x: Tensor) -> Tensor:
        x_hat = self.decode(self.encode(x)).reshape(*x.shape[: x.ndim - 1], -1)
        if self.takes_heads_apart(x):
            x_hat = x_hat.reshape(x.shape)
        return (x_hat + self._skipped(x.to(self.dtype))).to(x.dtype)

    def run_with_hooks(self, x: Tensor, fwd_hooks: list[tuple[str, Hook]]) -> Tensor:
        """forward(x) with hooks `fn(value, hook)` that see, or replace, what passes a point."""
        with self.hooks(fwd_hooks):
            return self(x)

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[str, Hook]]) -> Iterator["HookedSAE"]:
        """The SAE with these hooks, for as long as the block lasts."""
        handles = [self._add(name, hook) for name, hook in fwd_hooks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def add_hook(self, name: str, hook: Hook) -> None:
        """Have `hook(value, hook)` see, or replace, what passes a point until `reset_hooks`."""
        self._lasting.append(self._add(name, hook))

    def reset_hooks(self) -> None:
        """Remove what `add_hook` added."""
        while self._lasting:
            self._lasting.pop().remove()

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Take rows as they are instead of multiplied by `scaling_factor`."""
        self.fold_activation_scale(scaling_factor)

    def run_with_cache(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """forward(x), and what passed each hook point."""
        cache: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            cache[str(hook.name)] = value.detach()

        out = self.run_with_hooks(x, [(name, keep) for name in POINTS])
        return out, cache

    def _add(self, name: str, hook: Hook) -> Any:
        if name not in POINTS:
            near = get_close_matches(name, POINTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"hook must be one of {list(POINTS)}, got {name!r}{hint}")
        point = getattr(self, name)
        return point.register_forward_hook(lambda _module, _args, out: hook(out, hook=point))


@cache
def hooked_class(core: type[SAE]) -> type[SAE]:
    """The SAE's class with hook points mixed in."""
    return type(core.__name__, (HookedSAE, core), {"__module__": core.__module__})


def hooked(sae: T) -> T:
    """The same SAE, with hook points from here on."""
    if not isinstance(sae, HookedSAE):
        sae.__class__ = hooked_class(type(sae))
        assert isinstance(sae, HookedSAE)
        sae.add_points()
    return sae
