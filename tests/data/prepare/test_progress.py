"""Interrupted preparations: they continue with an equal result, or not with other text or options."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from prepare_helpers import InterruptError, content_of, interrupting, listed, prepared
from pyarrow import parquet

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.dataset import UNFINISHED
from ds_gpt2.data.prepare import pipeline
from ds_gpt2.data.prepare.holdout import EveryPiece, FirstTokens
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Reading, local_source


@pytest.mark.parametrize("holdout", [EveryPiece(3), FirstTokens(1500)])
@pytest.mark.parametrize("seed", range(4))
def test_a_preparation_interrupted_many_times_has_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: Any, seed: int
) -> None:
    """Progress is recorded at random moments, and data are written after the last record."""
    generator = random.Random(seed)
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    lengths = [generator.choice([0, 1, 5, 30, 200]) for _ in range(120)]
    documents = [" ".join(f"w{generator.randrange(99)}" for _ in range(length)) for length in lengths]
    source = listed(documents[:50], documents[50:51], [None, *documents[51:]])
    recipe = Recipe(holdout, shard_tokens=700)
    prepare(source, tmp_path / "whole", recipe, workers=1)
    for _ in range(500):
        monkeypatch.setattr(pipeline, "_RECORD_SECONDS", generator.choice([0, 0.001, 99]))
        try:
            prepare(interrupting(source, generator.randrange(200)), tmp_path / "broken", recipe, workers=1)
            break
        except InterruptError:
            assert not (tmp_path / "broken").exists()
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_a_preparation_continues_only_with_the_same_text_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    source = listed(f"document {number}" for number in range(100))
    with pytest.raises(InterruptError):
        prepare(interrupting(source, 50), tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"out\.unfinished is an unfinished dataset of other text or options"):
        prepare(source, tmp_path / "out", Recipe(tokens=1000), workers=1)
    assert prepare(source, tmp_path / "out", workers=1).tokens("train") > 100


@pytest.mark.parametrize("seed", range(3))
def test_interruptions_with_damaged_documents_and_separators_do_not_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    texts = ["|".join("word " * generator.randrange(30) for _ in range(generator.randrange(1, 4))) for _ in range(40)]
    lines = [generator.choice([json.dumps({"text": text}), json.dumps({"text": text}), "{}"]) for text in texts]
    (tmp_path / "x.jsonl").write_text('{"text": "first"}\n' * 5 + "\n".join(lines))
    source = local_source([tmp_path / "x.jsonl"], reading=Reading(separator="|"))
    prepare(source, tmp_path / "whole", workers=1)
    (part,) = source.parts
    real = type(part).documents
    for _ in range(200):
        remaining = itertools.count(generator.randrange(1, 40), -1)

        def documents(part: Any, skip: int, remaining: Any = remaining) -> Iterator[Any]:
            for document in real(part, skip):
                if next(remaining) <= 0:
                    raise InterruptError
                yield document

        with monkeypatch.context() as broken:
            broken.setattr(type(part), "documents", documents)
            try:
                prepare(source, tmp_path / "broken", workers=1)
                break
            except InterruptError:
                pass
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b"[" * 30_000, b'{"format": 2}', b'{"format": 2, "identity": []}'],
    ids=range(7),
)
def test_a_damaged_progress_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / f"out{UNFINISHED}"
    directory.mkdir()
    (directory / "progress.json").write_bytes(content)
    with pytest.raises(UserError, match=r"progress\.json is damaged: remove .*out\.unfinished to start again"):
        prepared(["one", "two"], tmp_path / "out")
    assert (directory / "progress.json").read_bytes() == content


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Prepare a file of 100 documents into ``out``, interrupt it at the 60th, return its progress file."""

    def run(file: Path, **options: Any) -> Path:
        monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
        source = local_source([file], reading=Reading(**options))
        (part,) = source.parts
        real = type(part).documents

        def documents(part: Any, skip: int) -> Iterator[Any]:
            yield from itertools.islice(real(part, skip), 60)
            raise InterruptError

        with monkeypatch.context() as broken:
            broken.setattr(type(part), "documents", documents)
            with pytest.raises(InterruptError):
                prepare(source, tmp_path / "out", workers=1)
        return tmp_path / f"out{UNFINISHED}" / "progress.json"

    return run


def write_hundred_documents(path: Path) -> Path:
    texts = [f"document number {number}" for number in range(100)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts, "other": texts[::-1]}), path)
    else:
        path.write_text("".join(json.dumps({"text": text, "other": text[::-1]}) + "\n" for text in texts))
    return path


def convert_to_an_earlier_version(file: Path) -> None:
    content = json.loads(file.read_text())
    del content["reader"], content["counts"]["unreadable"], content["counts"]["endoftext"]
    content["identity"]["source"] = [row[:3] for row in content["identity"]["source"]]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_preparation_of_an_earlier_version_continues_or_starts_again(
    tmp_path: Path, log_messages: list[str], interrupted: Callable[..., Path], name: str
) -> None:
    """Parquet is read as before; text files are read differently, for example byte order marks."""
    file = write_hundred_documents(tmp_path / name)
    prepare(local_source([file]), tmp_path / "whole", workers=1)
    convert_to_an_earlier_version(interrupted(file))
    prepare(local_source([file]), tmp_path / "out", workers=1)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    restarts = [line for line in log_messages if "started by an earlier version" in line and "starting again" in line]
    assert len(restarts) == (name == "x.jsonl")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
@pytest.mark.parametrize("options", [{"column": "other"}, {"separator": " "}])
def test_a_preparation_does_not_continue_with_another_column_or_separator(
    tmp_path: Path, interrupted: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    file = write_hundred_documents(tmp_path / name)
    interrupted(file)
    with pytest.raises(UserError, match=r"out\.unfinished is an unfinished dataset of other text or options"):
        prepare(local_source([file], reading=Reading(**options)), tmp_path / "out", workers=1)


def test_missing_tokens_are_an_error(tmp_path: Path, interrupted: Callable[..., Path]) -> None:
    file = write_hundred_documents(tmp_path / "x.jsonl")
    shard = interrupted(file).with_name("train_000000.bin.unfinished")
    with shard.open("r+b") as content:
        content.truncate(shard.stat().st_size // 2)
    with pytest.raises(UserError, match=r"out\.unfinished lacks tokens that progress\.json records as written"):
        prepare(local_source([file]), tmp_path / "out", workers=1)
    shard.unlink()
    with pytest.raises(UserError, match=r"out\.unfinished lacks tokens that progress\.json records as written"):
        prepare(local_source([file]), tmp_path / "out", workers=1)


def test_unusual_characters_are_counted_correctly_after_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    documents = [
        f"line {number} of it\n" * 9 + "\ufffd\0\x01 and \x7f \t\x1b" * (number % 9 == 8) for number in range(60)
    ]
    source = listed(documents)
    dataset = prepare(source, tmp_path / "whole", workers=1)
    assert (dataset.counts["replacement"], dataset.counts["control"]) == (6, 18)
    assert [line.split(":")[0] for line in log_messages] == [
        "0, document 9, character 118",
        "0, document 9, character 119",
    ]
    for after in (3, 20, 45):
        with pytest.raises(InterruptError):
            prepare(interrupting(source, after), tmp_path / "broken", workers=1)
    prepare(source, tmp_path / "broken", workers=1)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_an_error_late_in_a_file_retains_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    path = tmp_path / "x.txt"
    path.write_bytes(b"a good line of text\n" * 150_000 + "Les élèves là. ".encode("latin-1") * 60_000)
    for _ in range(2):
        with pytest.raises(UserError, match="are not valid in the encoding of its beginning"):
            prepare(local_source([path]), tmp_path / "out", workers=1)
        assert (tmp_path / "out.unfinished" / "progress.json").is_file()
    with pytest.raises(UserError, match="an unfinished dataset of other text or options"):
        prepare(local_source([path], reading=Reading(encoding="latin-1")), tmp_path / "out", workers=1)
