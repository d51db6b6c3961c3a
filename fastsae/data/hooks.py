"""Names of activations inside a Hugging Face model: read one, or put another in its place.

Two spellings resolve on a plain model: TransformerLens's (`blocks.8.hook_resid_post`) and the
path of a module (`model.layers.8`), which means that module's output. A model that brings names of
its own along (`LanguageModel.hooks`) resolves those first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastsae.data.language_model import LanguageModel


@dataclass(frozen=True)
class HookPoint:
    """One activation of a model: what goes into a module, or what comes out of it."""

    name: str
    """As it was asked for; goes into an SAE's metadata."""
    module_path: str
    side: Literal["input", "output"]


class _Place(NamedTuple):
    paths: tuple[str, ...]
    """Paths below a layer, the first that exists is meant; "" is the layer itself."""
    side: Literal["input", "output"]


_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")

# Gemma 2, Gemma 3 and OLMo 2 normalise what attention and MLP add to the residual stream.
_PLACES = {
    "hook_resid_pre": _Place(("",), "input"),
    "hook_resid_post": _Place(("",), "output"),
    "hook_attn_out": _Place(_ATTENTION, "output"),
    "hook_mlp_out": _Place(
        ("post_feedforward_layernorm", "mlp", "feed_forward", "block_sparse_moe"), "output"
    ),
    "mlp.hook_in": _Place(("mlp", "feed_forward", "block_sparse_moe"), "input"),
    "attn.hook_z": _Place(tuple(f"{a}.{p}" for a in _ATTENTION for p in _PROJECTIONS), "input"),
}


class _Stop(Exception):
    """Ends a forward pass at the hooked module."""


def resid_hook_name(layer: int) -> str:
    """Name of the residual stream after `layer`: `blocks.{layer}.hook_resid_post`."""
    if layer < 0:
        raise ValueError(f"layer must be at least 0, got {layer}")
    return f"blocks.{layer}.hook_resid_post"


def hook_names(lm: LanguageModel) -> list[str]:
    """TransformerLens's names of the activations that a plain model has, layer by layer."""
    names = [f"blocks.{layer}.{place}" for layer in range(lm.n_layers) for place in _PLACES]
    found = []
    for name in names:
        with suppress(ValueError):
            found.append(resolve_hook(lm, name).name)
    return found


def resolve_hook(lm: LanguageModel, name: str) -> HookPoint:
    """Find the activation called `name` in the model.

    Args:
        name: `blocks.{l}.` and one of hook_resid_pre, hook_resid_post, hook_attn_out,
            hook_mlp_out, attn.hook_z (heads flattened into one axis); or the path of a module.

    Raises:
        ValueError: the model has no such activation, or no such layer.
    """
    layers = layers_path(lm)
    modules = dict(lm.model.named_modules())
    layer = re.match(rf"(?:blocks|{re.escape(layers)})\.(\d+)(?:\.|$)", name)
    if layer and int(layer[1]) >= lm.n_layers:
        raise ValueError(
            f"hook layer must be from 0 to {lm.n_layers - 1} in {lm.name}, got {layer[1]} ({name})"
        )
    if name in lm.hooks:
        return HookPoint(name=name, module_path=lm.hooks[name], side="output")
    if name and name in modules:
        return HookPoint(name=name, module_path=name, side="output")
    place = _PLACES.get(name[layer.end() :]) if layer and name.startswith("blocks.") else None
    if layer is None or place is None:
        raise ValueError(_unknown(lm, name, layer[1] if layer else "0", modules))
    for below in _paths_of(place, f"{layers}.{layer[1]}", modules):
        if below in modules:
            return HookPoint(name=name, module_path=below, side=place.side)
    kind = type(modules[f"{layers}.{layer[1]}"]).__name__
    raise ValueError(
        f"hook {name} needs a layer with a module called one of {', '.join(place.paths)}, "
        f"got {kind}; name the path of a module instead"
    )


def capture(
    lm: LanguageModel, hook: HookPoint, tokens: Int[Tensor, "n L"]
) -> Float[Tensor, "n L D"]:
    """The activation at `hook`. The model runs up to the hooked module and no further.

    Raises:
        ValueError: what is there is not one vector per token.
        RuntimeError: the forward pass never reaches the module.
    """
    return capture_all(lm, [hook], tokens)[0]


def capture_all(
    lm: LanguageModel, hooks: Sequence[HookPoint], tokens: Int[Tensor, "n L"]
) -> list[Float[Tensor, "n L _"]]:
    """The activations at several hooks of one pass, which ends at the last one that is reached.

    Raises:
        ValueError, RuntimeError: as `capture`, naming the hook.
    """
    captured: dict[int, Tensor] = {}

    def keep(place: int, value: Tensor) -> Tensor:
        captured[place] = value
        if len(captured) == len(hooks):
            raise _Stop
        return value

    with torch.no_grad(), ExitStack() as attached, suppress(_Stop):
        for place, hook in enumerate(hooks):
            attached.enter_context(_attached(lm, hook, partial(keep, place)))
        lm.model(input_ids=tokens.to(lm.device, non_blocking=True), use_cache=False)
    for place, hook in enumerate(hooks):
        if place not in captured:
            raise RuntimeError(f"hook {hook.name}: {hook.module_path} is never run by {lm.name}")
        if captured[place].shape[:-1] != tokens.shape:
            raise ValueError(
                f"hook must be an activation of shape [n, L, D], one vector per token, got "
                f"{list(captured[place].shape)} at {hook.name} for {list(tokens.shape)} tokens"
            )
    return [captured[place] for place in range(len(hooks))]


@contextmanager
def splice(
    lm: LanguageModel, hook: HookPoint, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside this context every forward pass continues from `replace(activation)`.

    Args:
        replace: takes the activation [n, L, D] and returns one of the same shape.

    Raises:
        ValueError: `replace` returned another shape.
    """

    def edit(value: Tensor) -> Tensor:
        new = replace(value)
        if new.shape != value.shape:
            raise ValueError(
                f"replace must return the shape of the activation at {hook.name}, "
                f"{list(value.shape)}, got {list(new.shape)}"
            )
        return new.to(value.dtype)

    with _attached(lm, hook, edit):
        yield


def d_at(lm: LanguageModel, hook: HookPoint) -> int:
    """Width of the activation at `hook`, found by running one token."""
    return capture(lm, hook, torch.zeros(1, 1, dtype=torch.long)).shape[-1]


@contextmanager
def _attached(
    lm: LanguageModel, hook: HookPoint, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    handle = attach(lm, hook, edit)
    try:
        yield
    finally:
        handle.remove()


def attach(lm: LanguageModel, hook: HookPoint, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """From now on the hooked activation goes through `edit`, whichever way the module passes it.

    One with heads, [n, L, n_heads, d_head], goes through with its heads flattened.

    Returns:
        What takes `edit` off again, by `remove()`.
    """

    def flat(value: Tensor) -> Tensor:
        return edit(value.flatten(2)).reshape(value.shape) if value.dim() == 4 else edit(value)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (flat(_tensor(output[0], hook)), *output[1:])
        return flat(_tensor(output, hook))

    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (flat(_tensor(args[0], hook)), *args[1:]), kwargs
        value = _tensor(kwargs.get("hidden_states"), hook)
        return args, {**kwargs, "hidden_states": flat(value)}

    module = lm.model.get_submodule(hook.module_path)
    if hook.side == "output":
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _tensor(value: Any, hook: HookPoint) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"hook must be a module whose {hook.side} is a tensor, "
            f"got {type(value).__name__} at {hook.name}"
        )
    return value


def layers_path(lm: LanguageModel) -> str:
    """Path of the list of transformer layers: the first list that has as many as the model."""
    for path, module in lm.model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == lm.n_layers:
            return path
    raise ValueError(f"model must keep its {lm.n_layers} layers in a ModuleList, got {lm.name}")


def _paths_of(place: _Place, layer: str, modules: Mapping[str, nn.Module]) -> list[str]:
    paths = place.paths
    if paths is _ATTENTION and f"{layer}.post_feedforward_layernorm" in modules:
        paths = ("post_attention_layernorm", *paths)
    return [f"{layer}.{below}" if below else layer for below in paths]


def _unknown(lm: LanguageModel, name: str, layer: str, modules: Mapping[str, nn.Module]) -> str:
    places = [f"blocks.{layer}.{place}" for place in _PLACES]
    known = [*places, *lm.hooks, *(path for path in modules if path)]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[: len(_PLACES)]
    return f"hook must name an activation of {lm.name}, got {name!r}; nearest: {', '.join(near)}"
