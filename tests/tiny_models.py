"""Llamas with random weights, small enough to be made and run in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsae.data import LanguageModel, load_language_model
from fastsae.data.hooks import capture_all

NO_TOKENIZER: Any = None
VOCABULARY = 50
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def tiny_llama(**changes: Any) -> LanguageModel:
    """A model without a tokenizer, whose tokens are 0 to 49."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LanguageModel("tiny", model, NO_TOKENIZER)


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """A folder that `load_language_model` reads, with the offline default's tokenizer."""
    tokenizer = load_language_model().tokenizer
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    tiny_llama(**{**settings, **changes}).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_stories(folder: Path, n: int) -> str:
    """A jsonl file of documents that differ."""
    lines = [f"Story {i} is about {i} boats and {7 * i % 11} bridges. " * 4 for i in range(n)]
    path = folder / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def poisoned(monkeypatch: pytest.MonkeyPatch, value: float, call: int) -> None:
    """`value` in one number of one activation of one pass, at the first hook."""
    calls = []

    def capture_poisoned(lm, hooks, tokens):
        found = capture_all(lm, hooks, tokens)
        calls.append(1)
        if tokens.shape[1] > 1 and len(calls) == call:
            found[0][2, 5, 3] = value
        return found

    monkeypatch.setattr("fastsae.data.model_rows.capture_all", capture_poisoned)
