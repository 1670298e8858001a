"""Verification of datasets, statistics of their documents, examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.cli import main
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import open_dataset, read_dataset
from ds_gpt2.data.inspect import Lengths, examples, lengths, verify_shards
from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Source
from ds_gpt2.data.shards import HEADER_BYTES, header_of

END = tokenizer.END_OF_TEXT
DOCUMENTS = [f"This is document number {number}, " + "and it goes on " * (number % 5) for number in range(100)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source = Source("test", [Listed("documents", lambda: [None, *DOCUMENTS])])
    return prepare(source, tmp_path / "data", Recipe(EveryPiece(10), shard_tokens=400), workers=1).dir


def problems(directory: Path) -> dict[str, str]:
    return {report.file: report.problem for report in verify_shards(read_dataset(directory)) if report.problem}


def test_a_prepared_dataset_passes_verification(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = verify_shards(open_dataset(data))
    assert len(reports) > 4 and all(report.problem is None for report in reports)
    assert sum(report.end_of_text for report in reports) == 100
    assert main(["verify", str(data)]) == 0
    assert f"{len(reports)} of {len(reports)} shards are good" in capsys.readouterr().out


def test_verification_reports_the_problem_of_each_shard(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(data.glob("train_*.bin"))
    shutil.copy(shards[0], shards[1])  # a duplicate has a wrong hash, too
    with shards[2].open("r+b") as file:
        file.truncate(HEADER_BYTES + 100)
    content = bytearray(shards[3].read_bytes())
    content[HEADER_BYTES + 9] ^= 4
    shards[3].write_bytes(content)
    (data / "val_000000.bin").unlink()
    found = problems(data)
    assert sorted(found) == [shards[1].name, shards[2].name, shards[3].name, "val_000000.bin"]
    assert "sha256" in found[shards[1].name] and "sha256" in found[shards[3].name]
    assert "its header requires" in found[shards[2].name] and "is missing" in found["val_000000.bin"]
    assert main(["verify", str(data), "--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert {report["file"] for report in output if report["problem"]} == set(found)


def test_shards_without_an_index_are_verified_by_content(tmp_path: Path) -> None:
    def write(name: str, tokens: list[int]) -> None:
        (tmp_path / name).write_bytes(header_of(len(tokens)) + np.array(tokens, "<u2").tobytes())

    write("x_val_000000.bin", [END, 1, 2, 3])
    write("x_train_000001.bin", [END, 4, 5, 6])
    write("x_train_000002.bin", [END, 1, 2, 3])
    write("x_train_000003.bin", [END, 1, 2, 60_000])
    write("x_train_000004.bin", [END] * 50)
    write("x_train_000005.bin", [])
    found = problems(tmp_path)
    assert found.pop("x_val_000000.bin", None) or found.pop("x_train_000002.bin")  # duplicates
    assert "token id 60000" in found["x_train_000003.bin"] and "is not text" in found["x_train_000004.bin"]
    assert found["x_train_000005.bin"] == "is empty" and len(found) == 3


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


def test_inspect_reports_a_shard_of_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = np.full(500, 60_000, "<u2")
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(header_of(500) + content.tobytes())
    assert main(["inspect", str(tmp_path)]) == 2
    assert "x_train_0.bin has token id 60000, GPT-2's highest is 50256" in capsys.readouterr().err


def test_verify_reports_shards_of_a_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("x_train_0.bin", "x_validation_0.bin", "x_test_0.bin")):
        content = np.arange(number, number + 500, dtype="<u2")
        (tmp_path / name).write_bytes(header_of(500) + content.tobytes())
    assert main(["verify", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert (
        "skipped, because their names mark them as test data: x_test_0.bin" in output
        and "2 of 2 shards are good" in output
    )


def test_verify_names_subdirectories_with_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "top" / "deep").mkdir(parents=True)
    (tmp_path / "top" / "deep" / "x_train_0.bin").write_bytes(header_of(5) + bytes(10))
    for name, expected in (("empty", "has neither"), ("top", "its subdirectories deep have shards: give one of them")):
        assert main(["verify", str(tmp_path / name)]) == 2
        output = capsys.readouterr().err
        assert output.startswith(f"error: no data: {tmp_path / name} ") and expected in output
        assert output.count("\n") == 1


def test_verify_reports_every_shard_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a_train_0.bin", "b_train_1.bin", "x_val_0.bin")):
        content = np.arange(number, number + 500, dtype="<u2").tobytes()
        (tmp_path / name).write_bytes(header_of(500) + content[: 999 if number == 0 else None])
    assert main(["verify", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert output.startswith("BAD   a_train_0.bin") and "2 of 3 shards are good" in output


def test_examples_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [f"{number} \x1b[2J\x1b]0;title\x07\n\tindented" for number in range(40)]
    source = Source("test\x1b[31m", [Listed("documents", lambda: documents)])
    directory = prepare(source, tmp_path / "data", Recipe(EveryPiece(10)), workers=1).dir
    capsys.readouterr()
    assert main(["inspect", str(directory), "--seed", "1"]) == 0
    output = capsys.readouterr().out
    assert "\\x1b[2J\\x1b]0;title\\x07\n\tindented" in output and "\x1b" not in output
