"""Models that carry SAEs: SAELens's calls, on HookedTransformer and on the bridge.

An SAE is attached by a forward hook of the hook point it belongs to, so that the model's modules
stay what they are and its own hooks go on working.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from fastsae.sae_lens.attached import Attached
from fastsae.sae_lens.hooked_sae import HookedSAE, hooked
from fastsae.saes import SAE
from fastsae.saes.centred import takes_centred_rows

MLP_INPUT = ".mlp.hook_in"
"""A point of SAELens's that TransformerLens's own models lack: what goes into an MLP."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
Hook = tuple[Any, Callable[..., Any]]
"""A name, or a function of a name that chooses; and what is called with (value, hook=point)."""


class HostsSAEs:
    """Mixed into a model with TransformerLens's `hook_dict`.

    Names of an SAE's points are those of its hook: `blocks.5.hook_resid_post.hook_sae_acts_post`.
    """

    @property
    def _attached(self) -> dict[str, Attached]:
        return self.__dict__.setdefault("_attached_saes", {})

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The SAEs that are attached, by hook name."""
        return {name: attached.sae for name, attached in self._attached.items()}

    def add_sae(
        self,
        sae: SAE,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> None:
        """Attach an SAE: from now on the model continues from its output.

        A transcoder reads at `hook_name` and writes at `hook_name_out`. An SAE at the same hook is
        replaced. One that was trained on a centred residual stream gets its rows centred.

        Args:
            use_error_term: add what the SAE misses, so that the model computes as without it; None:
                as the SAE says.
            exclude_special_tokens: leave the activation alone at positions of these token ids;
                True: the tokenizer's special ones.

        Raises:
            ValueError: the SAE names no hook, or one that the model lacks.
        """
        name = self._hook_name(sae, "hook_name")
        out = self._hook_name(sae, "hook_name_out") if "hook_name_out" in _named(sae) else name
        self.reset_saes([name])
        sae = hooked(sae)
        assert isinstance(sae, HookedSAE)
        model = self._module()
        attached = Attached(
            sae,
            use_error_term=sae.use_error_term if use_error_term is None else use_error_term,
            centred=out == name and takes_centred_rows(_named(sae), model),
            excluded=self._excluded(exclude_special_tokens),
            tokens=lambda: self.__dict__["_tokens_of_pass"],
        )
        attached.handles.append(self._listen(out, attached.write))
        if out != name:
            attached.handles.append(self._listen(name, attached.read))
        if attached.excluded:
            handle = self._embedding().register_forward_pre_hook(self._keep_tokens)
            attached.handles.append(handle)
        self._warn_of_processing(sae)
        self._attached[name] = attached

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
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Any]:
        """Inside this context the SAEs are attached; those they replaced come back afterwards."""
        chosen = [saes] if isinstance(saes, SAE) else list(saes)
        before = [(a.sae, a.use_error_term, a.excluded) for a in self._attached.values()]
        try:
            for sae in chosen:
                self.add_sae(sae, use_error_term, exclude_special_tokens)
            yield self
        finally:
            if reset_saes_end:
                self.reset_saes()
                for settings in before:
                    self.add_sae(*settings)

    def run_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> Any:
        """The model's output with these SAEs attached."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*args, **kwargs)  # type: ignore[operator]

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        names_filter: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Output and cache, the SAEs' points included."""
        wanted = as_filter(names_filter)
        kept: dict[str, Tensor] = {}
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
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
        exclude_special_tokens: bool | Sequence[int] = False,
        fwd_hooks: Sequence[Hook] = (),
        **kwargs: Any,
    ) -> Any:
        """The model's output with SAEs attached and hooks `fn(value, hook)` at points of either."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            ours, theirs = self._split(fwd_hooks)
            with self._listening(ours):
                return self.run_with_hooks(  # type: ignore[attr-defined]
                    *args, fwd_hooks=theirs, **kwargs
                )

    def generate(self, *args: Any, fwd_hooks: Sequence[Hook] = (), **kwargs: Any) -> Any:
        """As the model's own; `fwd_hooks` act on every forward pass of it."""
        ours, theirs = self._split(fwd_hooks)
        handles = [
            self._listen(name, partial(hook, hook=hook_point(name)))
            for chosen, hook in theirs
            for name in ([chosen] if isinstance(chosen, str) else filter(chosen, self._points()))
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
        for chosen, _ in theirs:
            if not callable(chosen) and not self._has_point(chosen):
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

    def _module(self) -> nn.Module:
        """What holds the model's norms."""
        assert isinstance(self, nn.Module)
        return self

    def _points(self) -> Collection[str]:
        """Names of the activations that can be listened to, for hooks that choose by name."""
        return self.hook_dict  # type: ignore[attr-defined]

    def _has_point(self, name: str) -> bool:
        if name in self._points():
            return True
        modules = dict(self._module().named_modules()) if name.endswith(MLP_INPUT) else {}
        return name.removesuffix(".hook_in") in modules

    def _listen(self, name: str, see: Callable[[Tensor], Tensor | None]) -> Any:
        """From now on `see` sees the activation, and replaces it where it returns one."""
        if name not in self._points():
            mlp = self._module().get_submodule(name.removesuffix(".hook_in"))
            return mlp.register_forward_pre_hook(lambda _module, args: see(args[0]))
        point = self.hook_dict[name]  # type: ignore[attr-defined]
        return point.register_forward_hook(lambda _module, _args, out: see(out))

    def _embedding(self) -> nn.Module:
        """What is given the token ids."""
        return self.embed  # type: ignore[attr-defined]

    def _keep_tokens(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.__dict__["_tokens_of_pass"] = args[0]

    def _excluded(self, chosen: bool | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(chosen, bool):
            return tuple(chosen)
        if not chosen:
            return ()
        tokenizer = getattr(self, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "exclude_special_tokens must be token ids where the model has no tokenizer, "
                "got True"
            )
        found = {getattr(tokenizer, name, None) for name in SPECIAL}
        return tuple(sorted(i for i in found if i is not None))

    def _warn_of_processing(self, sae: SAE) -> None:
        """What was taken off the model cannot be put back."""
        kwargs = _named(sae).get("model_from_pretrained_kwargs") or {}
        W_E = getattr(self, "W_E", None)
        if kwargs.get("center_writing_weights") is not False or not isinstance(W_E, Tensor):
            return
        if bool((W_E.mean(-1).abs() < 1e-4 * W_E.abs().mean()).all()):
            warnings.warn(
                "the SAE's model_from_pretrained_kwargs must be the model's, got "
                "center_writing_weights=False and a model whose residual stream is centred: load "
                "the model with these arguments",
                stacklevel=3,
            )

    def _hook_name(self, sae: SAE, field: str) -> str:
        name = _named(sae).get(field)
        if name is None or not self._has_point(str(name)):
            raise ValueError(
                f"{field} in the SAE's metadata must be a hook point of the model, got {name!r}"
            )
        return str(name)


def _named(sae: SAE) -> dict[str, Any]:
    return {k: v for k, v in sae.cfg.metadata.items() if v is not None}


def hook_point(name: str) -> HookPoint:
    """What a hook is told of the activation it is called with."""
    point = HookPoint()
    point.name = name
    return point


def _register(point: HookPoint, hook: Callable[..., Any]) -> Any:
    return point.register_forward_hook(lambda _module, _args, out: hook(out, hook=point))


def _keep_in(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(value: Tensor, hook: HookPoint) -> None:
        kept[name] = value.detach()

    return keep


def as_filter(names_filter: Any) -> Callable[[str], bool]:
    if names_filter is None:
        return lambda _: True
    if callable(names_filter):
        return lambda name: bool(names_filter(name))
    names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    return lambda name: name in names
