"""`SAEHuggingFaceModel`: a plain Hugging Face model with SAELens's calls."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastsae.data.hooks import attach, hook_names, resolve_hook
from fastsae.data.language_model import LanguageModel
from fastsae.sae_lens.hosts import Hook, HostsSAEs, as_filter, hook_point
from fastsae.saes import SAE


class _PlainModel:
    """The calls of TransformerLens's models that `HostsSAEs` builds on."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.lm = LanguageModel(getattr(model, "name_or_path", "model"), model, tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def run_with_hooks(self, *args: Any, fwd_hooks: Sequence[Hook] = (), **kwargs: Any) -> Any:
        """The model's output, with hooks `fn(value, hook)` that see or replace activations."""
        handles = [
            self._listen(name, partial(hook, hook=hook_point(name)))
            for chosen, hook in fwd_hooks
            for name in ([chosen] if isinstance(chosen, str) else filter(chosen, self._points()))
        ]
        try:
            return self(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def run_with_cache(
        self, *args: Any, names_filter: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The model's output, and its activations by name."""
        cache: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            cache[hook.name] = value.detach()

        hooks = [(name, keep) for name in filter(as_filter(names_filter), self._points())]
        return self.run_with_hooks(*args, fwd_hooks=hooks, **kwargs), cache

    def _points(self) -> Collection[str]:
        return hook_names(self.lm)

    def _listen(self, name: str, see: Callable[[Tensor], Tensor | None]) -> Any:
        def edit(x: Tensor) -> Tensor:
            new = see(x)
            return x if new is None else new.to(x.dtype)

        return attach(self.lm, resolve_hook(self.lm, name), edit)


class SAEHuggingFaceModel(HostsSAEs, _PlainModel):
    """A Hugging Face model that carries SAEs; calling it calls the model, which is not changed.

        model = SAEHuggingFaceModel(AutoModelForCausalLM.from_pretrained(name), tokenizer)
        output, cache = model.run_with_cache_with_saes(input_ids, saes=[sae])

    Hook names are TransformerLens's (`blocks.8.hook_resid_post`) or paths of modules. Heads come
    flattened.
    """

    def _module(self) -> nn.Module:
        return self.model

    def _points(self) -> Collection[str]:
        return _PlainModel._points(self)

    def _has_point(self, name: str) -> bool:
        try:
            resolve_hook(self.lm, name)
        except ValueError:
            return False
        return True

    def _listen(self, name: str, see: Callable[[Tensor], Tensor | None]) -> Any:
        return _PlainModel._listen(self, name, see)

    def _embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def _hook_name(self, sae: SAE, field: str) -> str:
        """The SAE's hook; where only Hugging Face's name of it is known here, that one."""
        theirs = str(sae.cfg.metadata.get(f"hf_{field}")).removesuffix(".output")
        known = self._has_point(str(sae.cfg.metadata.get(field)))
        return theirs if not known and self._has_point(theirs) else super()._hook_name(sae, field)
