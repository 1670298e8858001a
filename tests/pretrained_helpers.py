"""Helpers of the tests of ``pretrained``: models of transformers, and changes of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_gpt2.data import tokenizer
from ds_gpt2.model.shape import VOCABULARY
from ds_gpt2.pretrained.load import as_model, read

transformers = pytest.importorskip("transformers", reason="transformers 5 needs Python 3.10; in the extra dev")

TOKENS = torch.tensor([tokenizer.gpt2().encode_ordinary("The statement's 3 parts are naïve, if x == 1. " * 4)[:48]])
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def make(directory: Path, vocabulary: int = VOCABULARY, **options: Any) -> Path:
    """Save a small model of transformers with weights so large that its options affect the logits."""
    torch.manual_seed(7)
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=vocabulary, initializer_range=0.3, **options
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def theirs(directory: Path, **options: Any) -> torch.Tensor:
    """Return the logits (48, vocabulary) of transformers."""
    model = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(TOKENS).logits[0]


def ours(directory: Path) -> torch.Tensor:
    """Return our logits (48, 50257)."""
    found = read(directory)
    with torch.no_grad():
        return as_model(found.shape, found.weights).logits(TOKENS)[0]


def change(directory: Path, **values: Any) -> None:
    """Set fields of config.json; ``...`` removes a field."""
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({name: each for name, each in (config | values).items() if each != ...}))


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    edit(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
