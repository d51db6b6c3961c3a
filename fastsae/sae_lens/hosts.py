"""TransformerLens models that carry SAEs: SAELens's calls, on HookedTransformer and on the bridge.

An SAE is attached by a forward hook of the hook point it belongs to, so that the model's modules
stay what they are and its own hooks go on working.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from fastsae.sae_lens.hooked_sae import HookedSAE, hooked
from fastsae.saes import SAE


class _Attached(NamedTuple):
    sae: HookedSAE
    handles: list[Any]
    use_error_term: bool


Hook = tuple[Any, Callable[..., Any]]
"""A name, or a function of a name that chooses; and what is called with (value, hook=point)."""


class HostsSAEs:
    """Mixed into a model with TransformerLens's `hook_dict`.

    Names of an SAE's points are those of its hook: `blocks.5.hook_resid_post.hook_sae_acts_post`.
    """

    @property
    def _attached(self) -> dict[str, _Attached]:
        return self.__dict__.setdefault("_attached_saes", {})

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The SAEs that are attached, by hook name."""
        return {name: attached.sae for name, attached in self._attached.items()}

    def add_sae(self, sae: SAE, use_error_term: bool | None = None) -> None:
        """Attach an SAE: from now on the model continues from its output.

        A transcoder reads at `hook_name` and writes at `hook_name_out`. An SAE at the same hook is
        replaced.

        Args:
            use_error_term: add what the SAE misses, so that the model computes as without it; None:
                as the SAE says.

        Raises:
            ValueError: the SAE names no hook, or one that the model lacks.
        """
        name = self._hook_name(sae, "hook_name")
        out = self._hook_name(sae, "hook_name_out") if "hook_name_out" in _named(sae) else name
        self.reset_saes([name])
        sae = hooked(sae)
        assert isinstance(sae, HookedSAE)
        error = sae.use_error_term if use_error_term is None else use_error_term
        seen: list[Tensor] = []

        def read(_module: Any, _args: Any, x: Tensor) -> None:
            seen[:] = [x]

        def write(_module: Any, _args: Any, original: Tensor) -> Tensor:
            x = original if out == name else seen.pop()
            with _error_term(sae, False):
                x_hat = sae(x) if not error else _with_error(sae, x, original)
            return x_hat.reshape(original.shape).to(original.dtype)

        points = self.hook_dict  # type: ignore[attr-defined]
        handles = [points[out].register_forward_hook(write)]
        if out != name:
            handles.append(points[name].register_forward_hook(read))
        self._attached[name] = _Attached(sae, handles, error)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Detach the SAEs at these hooks; None: all of them."""
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in list(self._attached) if names is None else names:
            attached = self._attached.pop(name, None)
            for handle in attached.handles if attached is not None else ():
                handle.remove()

    @contextmanager
    def saes(
        self,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
    ) -> Iterator[Any]:
        """Inside this context the SAEs are attached; those they replaced come back afterwards."""
        chosen = [saes] if isinstance(saes, SAE) else list(saes)
        before = {name: (a.sae, a.use_error_term) for name, a in self._attached.items()}
        try:
            for sae in chosen:
                self.add_sae(sae, use_error_term)
            yield self
        finally:
            if reset_saes_end:
                self.reset_saes()
                for sae, error in before.values():
                    self.add_sae(sae, error)

    def run_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output with these SAEs attached."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self(*args, **kwargs)  # type: ignore[operator]

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        names_filter: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Output and cache, the SAEs' points included."""
        wanted = _filter(names_filter)
        kept: dict[str, Tensor] = {}
        with self.saes(saes, reset_saes_end, use_error_term):
            hooks = [
                (f"{name}.{point}", _keep_in(kept, f"{name}.{point}"))
                for name, attached in self._attached.items()
                for point in attached.sae.hook_dict
                if wanted(f"{name}.{point}")
            ]
            with self._listening(hooks):
                out, cache = self.run_with_cache(  # type: ignore[attr-defined]
                    *args, names_filter=names_filter if names_filter is None else wanted, **kwargs
                )
        if isinstance(cache, dict):
            cache.update(kept)
        else:
            batched = getattr(cache, "has_batch_dim", True)
            cache.cache_dict.update(kept if batched else {k: v[0] for k, v in kept.items()})
        return out, cache

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        fwd_hooks: Sequence[Hook] = (),
        **kwargs: Any,
    ) -> Any:
        """The model's output with SAEs attached and hooks `fn(value, hook)` at points of either."""
        with self.saes(saes, reset_saes_end, use_error_term):
            ours, theirs = self._split(fwd_hooks)
            with self._listening(ours):
                return self.run_with_hooks(  # type: ignore[attr-defined]
                    *args, fwd_hooks=theirs, **kwargs
                )

    def generate(self, *args: Any, fwd_hooks: Sequence[Hook] = (), **kwargs: Any) -> Any:
        """As the model's own; `fwd_hooks` act on every forward pass of it."""
        ours, theirs = self._split(fwd_hooks)
        points = self.hook_dict  # type: ignore[attr-defined]
        handles = [
            _register(points[name], hook)
            for chosen, hook in theirs
            for name in points
            if (chosen(name) if callable(chosen) else chosen == name)
        ]
        try:
            with self._listening(ours):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            for handle in handles:
                handle.remove()

    def _split(self, hooks: Sequence[Hook]) -> tuple[list[Hook], list[Hook]]:
        """Hooks on points of attached SAEs, and the others, whose names must exist."""
        own = {f"{name}.{p}" for name, a in self._attached.items() for p in a.sae.hook_dict}
        ours: list[Hook] = [
            (name, hook)
            for chosen, hook in hooks
            for name in own
            if (chosen(name) if callable(chosen) else chosen == name)
        ]
        theirs: list[Hook] = [
            (chosen, hook) for chosen, hook in hooks if callable(chosen) or chosen not in own
        ]
        points = self.hook_dict  # type: ignore[attr-defined]
        for chosen, _ in theirs:
            if not callable(chosen) and chosen not in points:
                raise ValueError(f"hook must be a hook point of the model, got {chosen!r}")
        return ours, theirs

    @contextmanager
    def _listening(self, hooks: Sequence[Hook]) -> Iterator[None]:
        handles = []
        for name, hook in hooks:
            host, _, point = str(name).rpartition(".")
            handles.append(_register(self._attached[host].sae.hook_dict[point], hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_name(self, sae: SAE, field: str) -> str:
        name = _named(sae).get(field)
        points = self.hook_dict  # type: ignore[attr-defined]
        if name not in points:
            raise ValueError(
                f"{field} in the SAE's metadata must be a hook point of the model, got {name!r}"
            )
        return str(name)


def _named(sae: SAE) -> dict[str, Any]:
    return {k: v for k, v in sae.cfg.metadata.items() if v is not None}


def _with_error(sae: HookedSAE, x: Tensor, original: Tensor) -> Tensor:
    """What the SAE gives and what it misses of `original`, each through its hook point."""
    x_hat = sae(x)
    with torch.no_grad(), _silent(sae):
        error = original - sae(x).reshape(original.shape)
    return x_hat.reshape(original.shape) + sae.hook_sae_error(error)


@contextmanager
def _silent(sae: HookedSAE) -> Iterator[None]:
    """Inside this context no hook of the SAE is called."""
    held = {name: dict(point._forward_hooks) for name, point in sae.hook_dict.items()}
    for point in sae.hook_dict.values():
        point._forward_hooks.clear()
    try:
        yield
    finally:
        for name, point in sae.hook_dict.items():
            point._forward_hooks.update(held[name])


@contextmanager
def _error_term(sae: HookedSAE, on: bool) -> Iterator[None]:
    before, sae.use_error_term = sae.use_error_term, on
    try:
        yield
    finally:
        sae.use_error_term = before


def _register(point: HookPoint, hook: Callable[..., Any]) -> Any:
    return point.register_forward_hook(lambda _module, _args, out: hook(out, hook=point))


def _keep_in(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(value: Tensor, hook: HookPoint) -> None:
        kept[name] = value.detach()

    return keep


def _filter(names_filter: Any) -> Callable[[str], bool]:
    if names_filter is None:
        return lambda _: True
    if callable(names_filter):
        return lambda name: bool(names_filter(name))
    names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    return lambda name: name in names
