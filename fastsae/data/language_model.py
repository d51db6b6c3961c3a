"""Language models as a source of activations: frozen, in eval mode, from a hub or from disk."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fastsae.data import smollm2
from fastsae.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:  # names that resolve at run time without transformers
    PreTrainedModel, PreTrainedTokenizerBase = torch.nn.Module, Any

_log = logging.getLogger(__name__)

_WAYS_OUT = (
    "pass a local folder with config.json and weights, a .gguf file, "
    "or nothing for the offline default (SmolLM2-135M-Instruct)"
)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen causal language model and its tokenizer."""

    name: str
    """Loads the same model again through `load_language_model`; goes into an SAE's metadata."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Names of activations that the model brings along, each with the path of the module whose
    output it is."""

    @property
    def revision(self) -> str | None:
        """Commit of a model from a hub; None of another."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of transformer layers."""
        return int(self._config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def context_size(self) -> int:
        """Most positions the model was built for."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return int(limit if limit is not None else self.tokenizer.model_max_length)

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the token embedding."""
        return int(self._config.vocab_size)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The tokenizer's special tokens, bos, eos, padding; none without a tokenizer."""
        return tuple(sorted(getattr(self.tokenizer, "all_special_ids", ())))

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()


def load_language_model(
    model: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str = "main",
) -> LanguageModel:
    """Load a causal language model with SDPA attention, in eval mode, without gradients.

    Args:
        model: None for the offline default, SmolLM2-135M-Instruct; a folder in Hugging Face
            format; a `.gguf` file, converted once into the cache; else a name on the hub.
        device: where the model runs.
        dtype: of the weights and activations; None means float32 on a CPU, bfloat16 elsewhere.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        FileNotFoundError: `model` is a path and nothing is there.
        RuntimeError: the model cannot be read, or the cache cannot be written.
    """
    transformers = require("transformers", extra="train")
    device = torch.device(device)
    name, source = _locate(model)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    options = {_dtype_option(transformers): dtype, "attn_implementation": "sdpa"}
    try:
        with _no_progress_bars(transformers):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                source, revision=revision, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"model must be a causal language model that can be read here, "
            f"got {name!r}: {reason}; {_WAYS_OUT}"
        ) from error
    loaded = loaded.to(device).eval().requires_grad_(False)
    return LanguageModel(name=name, model=loaded, tokenizer=tokenizer)


def cache_folder() -> Path:
    """`$FASTSAE_CACHE`, else `$XDG_CACHE_HOME/fastsae`, else `~/.cache/fastsae`."""
    if own := os.environ.get("FASTSAE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsae"


def publish(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make `folder` with the files that `write(temporary_folder)` leaves, all of them or none.

    The temporary folder takes its final name in one rename. Of two processes that race, the
    second finds the first one's folder in place and drops its own.

    Raises:
        RuntimeError: the folder cannot be written.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        write(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"cache folder {folder.parent} must be writable and have room, got: {error}; "
            "set FASTSAE_CACHE to another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _locate(model: str | Path | None) -> tuple[str, str]:
    """Name of the model and the folder or hub name that transformers reads."""
    if model is None or str(model) == smollm2.NAME:
        return smollm2.NAME, str(_converted(smollm2.find_gguf(), digest=smollm2.SHA256))
    name, path = str(model), Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model folder must hold config.json, got {path} without it; {_WAYS_OUT}"
            )
        return name, str(path)
    if path.is_file() and path.suffix == ".gguf":
        return name, str(_converted(path, digest=smollm2.file_sha256(path)))
    is_path = isinstance(model, Path) or name.startswith((".", "~")) or path.is_absolute()
    if is_path or path.suffix == ".gguf" or path.exists():
        got = "another kind of file" if path.exists() else "nothing there"
        raise FileNotFoundError(
            f"model must be a folder, a .gguf file or a hub name, got {path}: {got}; {_WAYS_OUT}"
        )
    return name, name


def _converted(gguf: Path, digest: str) -> Path:
    """Folder in the cache with the model of a GGUF file, its weights in float32, made if absent."""
    folder = cache_folder() / "models" / f"{digest}-float32"
    if folder.is_dir():
        return folder
    require("gguf", extra="train")
    transformers = require("transformers", extra="train")
    _log.info("converting %s, once, into %s", gguf, folder)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    options = {_dtype_option(transformers): torch.float32}
    with _no_progress_bars(transformers):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
            raise RuntimeError(
                f"model must be a complete GGUF file that transformers supports, "
                f"got {gguf}: {error}; {_WAYS_OUT}"
            ) from error
        plain = _without_quantization(transformers, model)

        def write(target: Path) -> None:
            plain.save_pretrained(target)
            tokenizer.save_pretrained(target)

        return publish(folder, write)


def _without_quantization(transformers: Any, model: Any) -> Any:
    """The same weights in a model that agrees to be saved: one read from GGUF refuses."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _dtype_option(transformers: Any) -> str:
    """`dtype`, which transformers before 4.56 called `torch_dtype`."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


@contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    """Keep transformers's own bars off the terminal, and leave its setting as it was."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
