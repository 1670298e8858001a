"""Statistics of the documents of a dataset, examples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.cli import main
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.inspect import Lengths, examples, lengths
from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Source
from ds_gpt2.data.shards import header_of

END = tokenizer.END_OF_TEXT
DOCUMENTS = [f"This is document number {number}, " + "and it goes on " * (number % 5) for number in range(100)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source = Source("test", [Listed("documents", lambda: [None, *DOCUMENTS])])
    return prepare(source, tmp_path / "data", Recipe(EveryPiece(10), shard_tokens=400), workers=1).dir


def test_lengths_equal_those_of_the_documents(tmp_path: Path) -> None:
    source = Source("test", [Listed("documents", lambda: DOCUMENTS)])
    dataset = prepare(source, tmp_path / "data", Recipe(EveryPiece(10)), workers=1)
    encoded = [1 + len(tokenizer.gpt2().encode_ordinary(text)) for text in DOCUMENTS]
    held_out = encoded[9::10]
    assert lengths(dataset, "val") == Lengths(10, float(np.mean(held_out)), float(np.median(held_out)), max(held_out))
    assert lengths(dataset, "train").documents == 90


def test_examples_are_beginnings_of_documents(data: Path) -> None:
    dataset = open_dataset(data)
    found = list(examples(dataset, "train", 30, 8, seed=1))
    assert len({(file, position) for file, position, _ in found}) > 5
    assert found == list(examples(dataset, "train", 30, 8, seed=1))
    beginnings = [text for _, position, text in found if position > 0]
    assert len(beginnings) > 15
    assert all(any(document.startswith(text) for document in DOCUMENTS) for text in beginnings)


def test_inspect_prints_counts_and_examples(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(data), "--seed", "1", "--examples", "2"]) == 0
    output = capsys.readouterr().out
    assert "documents  100" in output and "null       1" in output
    assert "This is document number" in output
    parts = [int(count) for count in re.findall(r": (\d+) documents of ", output)]
    assert len(parts) == 2 and sum(parts) > 100  # shards of 400 tokens cut documents
    cut = f"  {sum(parts) - 100} times, the end of a shard or split cuts a document; each part counts as a document\n"
    assert cut in output


def test_inspect_reports_a_shard_of_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = np.full(500, 60_000, "<u2")
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(header_of(500) + content.tobytes())
    assert main(["inspect", str(tmp_path)]) == 2
    assert "x_train_0.bin has token id 60000, GPT-2's highest is 50256" in capsys.readouterr().err


def test_examples_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [f"{number} \x1b[2J\x1b]0;title\x07\n\tindented" for number in range(40)]
    source = Source("test\x1b[31m", [Listed("documents", lambda: documents)])
    directory = prepare(source, tmp_path / "data", Recipe(EveryPiece(10)), workers=1).dir
    capsys.readouterr()
    assert main(["inspect", str(directory), "--seed", "1"]) == 0
    output = capsys.readouterr().out
    assert "\\x1b[2J\\x1b]0;title\\x07\n\tindented" in output and "\x1b" not in output
