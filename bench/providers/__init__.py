"""Whole training steps to compare, one module a library; `PROVIDERS` is the list."""

import difflib
import importlib.util
from pathlib import Path

from bench.providers.base import Provider
from bench.providers.dictionary_learning import dictionary_learning_step
from bench.providers.fastsae import fastsae_step
from bench.providers.flex_sae import flex_sae_step
from bench.providers.plain import dense_mse, plain_step
from bench.providers.sae_lens import sae_lens_step
from bench.providers.sparsify import sparsify_step
from fastsae_kernels import Impl

SAE_LENS = ("sae_lens", "pip install sae-lens==6.54.12")

PROVIDERS: dict[str, Provider] = {
    "fastsae": Provider(fastsae_step),
    "fastsae-no-clip": Provider(lambda start: fastsae_step(start, clip=False)),
    "fastsae-plain-adam": Provider(lambda start: fastsae_step(start, kind="adam")),
    "reference": Provider(lambda start: fastsae_step(start, kind="adam", impl=Impl.REFERENCE)),
    "reference-compiled": Provider(lambda start: plain_step(start, dense_mse, compiled=True)),
    "plain-pytorch": Provider(plain_step),
    "sae-lens": Provider(sae_lens_step, *SAE_LENS),
    "sae-lens-accelerated": Provider(
        lambda start: sae_lens_step(start, accelerated=True), *SAE_LENS
    ),
    "sparsify": Provider(sparsify_step, "sparsify", "pip install eai-sparsify==1.3.3"),
    "dictionary-learning": Provider(
        dictionary_learning_step,
        "dictionary_learning",
        "pip install --no-deps dictionary-learning==0.1.0 nnsight==0.3.7",
    ),
    # Not `kernels`, which is a folder of this repository too.
    "flex-sae": Provider(flex_sae_step, "kernels.utils", "pip install kernels"),
}
PEERS = ["fastsae", "sae-lens", "sae-lens-accelerated", "sparsify", "dictionary-learning"]
"""What `--peers` compares: libraries, each as its users run it."""
GPU_PEERS = [*PEERS, "flex-sae"]
"""The same on a GPU."""


def find_provider(name: str) -> Provider:
    """A provider of the list, or `FILE.py:function`, the function being `build` of a `Provider`.

    Raises:
        ValueError: neither a known name nor a function of a file that exists.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    path, _, function = name.partition(":")
    if not path.endswith(".py"):
        near = difflib.get_close_matches(name, PROVIDERS)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"provider must be one of {list(PROVIDERS)} or FILE.py:function, got {name!r}{hint}"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"provider must be a function of a Python file, got no file {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"provider must be a function of {path}, got {function!r}")
    return Provider(getattr(module, function))
