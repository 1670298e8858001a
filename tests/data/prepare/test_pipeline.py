"""Preparation of datasets: tokens, splits, counts, limits, and equal results after interruptions."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from launched import PROJECT
from pyarrow import parquet

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import INDEX, UNFINISHED, open_dataset
from ds_gpt2.data.prepare import pipeline
from ds_gpt2.data.prepare.chunking import cut
from ds_gpt2.data.prepare.holdout import EveryPiece, FirstTokens
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Reading, Source, local_source
from ds_gpt2.data.prepare.worker_pool import Encoder, _Worker
from ds_gpt2.data.shards import open_shard

END = tokenizer.END_OF_TEXT
PROGRAM = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]  # as launch.sh does


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def listed(*parts: Iterable[str | None]) -> Source:
    contents = [list(part) for part in parts]
    return Source("test", [Listed(str(number), content.copy) for number, content in enumerate(contents)])


def prepared(documents: Iterable[str | None], out: Path, recipe: Recipe | None = None, workers: int = 1) -> Path:
    return prepare(listed(documents), out, recipe, workers=workers).dir


def tokens_of(directory: Path, split: str) -> list[int]:
    dataset = open_dataset(directory)
    shards = [open_shard(dataset.dir / shard.file) for shard in dataset.shards if shard.split == split]
    return np.concatenate(shards).tolist()


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


PROSE = st.text(st.sampled_from("ab ,.\n\n\t1é€\u00a0\u2003"), max_size=200)


@given(PROSE, st.integers(1, 20))
@example("aaaaaaaaaaaa\nb \n\n c", 3)
@example("a b\u00a0 c d\n e f", 1)
def test_pieces_have_the_tokens_of_the_whole_text(text: str, characters: int) -> None:
    encoding = tokenizer.gpt2()
    pieces = list(cut(text, characters))
    assert "".join(pieces) == text
    assert joined(encoding.encode_ordinary(piece) for piece in pieces) == encoding.encode_ordinary(text)


def test_a_text_without_lines_is_cut_between_words() -> None:
    assert max(map(len, cut("word " * 20_000, 1000))) < 1010
    assert list(cut("x" * 5000, 1000)) == ["x" * 5000]


@given(PROSE, st.integers(1, 20), st.integers(1, 60))
@example("aa aaaaaaa" + "\n" * 40 + "b\nccccccccc d", 1, 17)
def test_a_document_in_blocks_has_the_pieces_of_the_whole_document(text: str, characters: int, block: int) -> None:
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    assert list(cut(blocks, characters)) == list(cut(text, characters))


def test_end_of_text_precedes_every_document(tmp_path: Path) -> None:
    documents = [f"Document number {number}." for number in range(10)]
    prepared(documents, tmp_path / "out", Recipe(EveryPiece(5)))
    encoded = [[END, *tokenizer.gpt2().encode_ordinary(text)] for text in documents]
    held_out = [encoded[4], encoded[9]]
    assert tokens_of(tmp_path / "out", "val") == joined(held_out)
    assert tokens_of(tmp_path / "out", "train") == joined(text for text in encoded if text not in held_out)


def test_a_part_of_one_long_document_is_held_out(tmp_path: Path) -> None:
    text = "\n".join(f"Line {number} of a long document." for number in range(5000))
    prepared([text], tmp_path / "out")
    train, val = (tokens_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train.count(END) == val.count(END) == 1
    assert tokenizer.gpt2().decode(train[1:] + val[1:]) == text


def test_end_of_text_precedes_a_piece_after_a_change_of_split(tmp_path: Path) -> None:
    text = "\n".join(f"Line {number} of a long document." for number in range(5000))
    prepared([text], tmp_path / "out", Recipe(EveryPiece(3)))
    train, val = (tokens_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train.count(END) == 1 + val.count(END)


def test_the_first_tokens_are_held_out(tmp_path: Path) -> None:
    documents = [f"{number} words and more words" for number in range(100)]
    prepared(documents, tmp_path / "out", Recipe(FirstTokens(203)))
    stream = joined([END, *tokenizer.gpt2().encode_ordinary(text)] for text in documents)
    assert tokens_of(tmp_path / "out", "val") == stream[:203]
    train = tokens_of(tmp_path / "out", "train")
    assert train[0] == END and train[1:] == stream[203:]


@pytest.mark.parametrize("holdout", [EveryPiece(7), FirstTokens(100)])
def test_the_limit_of_tokens_is_exact(tmp_path: Path, holdout: Any) -> None:
    documents = [f"{number} words and more words" for number in range(400)]
    prepared(documents, tmp_path / "some", Recipe(holdout, tokens=1234))
    prepared(documents, tmp_path / "all", Recipe(holdout))
    some = {split: tokens_of(tmp_path / "some", split) for split in ("train", "val")}
    assert sum(map(len, some.values())) == 1234
    for split, tokens in some.items():
        assert tokens == tokens_of(tmp_path / "all", split)[: len(tokens)]


def test_shards_have_exactly_the_requested_tokens(tmp_path: Path) -> None:
    documents = [f"{number} words and more words" for number in range(400)]
    small, large = tmp_path / "small", tmp_path / "large"
    prepared(documents, small, Recipe(shard_tokens=500))
    prepared(documents, large)
    sizes = [shard.tokens for shard in open_dataset(small).split("train")]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {500}
    assert tokens_of(small, "train") == tokens_of(large, "train")


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    documents = [f"{number} " * number for number in range(1, 1500)]
    one, many = (prepared(documents, tmp_path / str(workers), workers=workers) for workers in (1, 3))
    assert content_of(one) == content_of(many)


def test_empty_and_null_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    out = prepared(["", "one", " \n", "two", None, "three", None], tmp_path / "out", Recipe(EveryPiece(3)))
    assert tokens_of(out, "train").count(END) == 2
    assert json.loads((out / INDEX).read_text())["counts"] == {"documents": 3, "empty": 2, "null": 2}


@pytest.mark.parametrize("documents", [[], ["", "  "], ["only one"]])
def test_too_little_text_leaves_no_files(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(UserError, match="too little text"):
        prepared(documents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        prepared(["one", "two"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_too_little_disk_space_is_an_error_at_the_start(tmp_path: Path) -> None:
    source = Source("test", [Listed("huge", list, tokens=1e15)])
    with pytest.raises(UserError, match=r"free, but 1000\.00 T tokens need about 2000\.00 TB"):
        prepare(source, tmp_path / "out")


class InterruptError(Exception):
    """Interrupts a preparation."""


def interrupting(source: Source, after: int) -> Source:
    """Return the same documents, with an exception after a number of them."""
    remaining = itertools.count(after, -1)

    def read(part: Any) -> Iterator[str | None]:
        for document in part.documents(0):
            if next(remaining) <= 0:
                raise InterruptError
            yield document

    return Source(source.name, [Listed(part.name, lambda part=part: read(part)) for part in source.parts])


@pytest.mark.parametrize("holdout", [EveryPiece(3), FirstTokens(1500)])
@pytest.mark.parametrize("seed", range(4))
def test_a_preparation_interrupted_many_times_has_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: Any, seed: int
) -> None:
    """Notes are written at random moments, and data are written after the last note."""
    generator = random.Random(seed)
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    lengths = [generator.choice([0, 1, 5, 30, 200]) for _ in range(120)]
    documents = [" ".join(f"w{generator.randrange(99)}" for _ in range(length)) for length in lengths]
    source = listed(documents[:50], documents[50:51], [None, *documents[51:]])
    recipe = Recipe(holdout, shard_tokens=700)
    prepare(source, tmp_path / "whole", recipe, workers=1)
    for _ in range(500):
        monkeypatch.setattr(pipeline, "_NOTE_SECONDS", generator.choice([0, 0.001, 99]))
        try:
            prepare(interrupting(source, generator.randrange(200)), tmp_path / "broken", recipe, workers=1)
            break
        except InterruptError:
            assert not (tmp_path / "broken").exists()
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_a_preparation_continues_only_with_the_same_text_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_NOTE_SECONDS", 0)
    source = listed(f"document {number}" for number in range(100))
    with pytest.raises(InterruptError):
        prepare(interrupting(source, 50), tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"out\.unfinished is an unfinished dataset of other text or options"):
        prepare(source, tmp_path / "out", Recipe(tokens=1000), workers=1)
    assert prepare(source, tmp_path / "out", workers=1).tokens("train") > 100


def command(data: Path, out: Path, *words: str) -> list[str]:
    return [*PROGRAM, "prepare", "text", str(data), "--out", str(out), "--workers", "2", *words]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write about 130 MB of lines, which take seconds to prepare."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"word{number}" for number in range(5000)]
    generator = random.Random(1)
    bodies = [" ".join(generator.choices(words, k=200)) for _ in range(2000)]
    for number in range(9):
        lines = (json.dumps({"text": f"{number} {line} {bodies[line % 2000]}"}) for line in range(8000))
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def test_a_command_killed_many_times_writes_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """The command or one of its workers is killed by SIGKILL."""
    whole = subprocess.run(command(text, tmp_path / "whole"), cwd=PROJECT, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout
    generator, ends = random.Random(3), []
    for attempt in range(30):
        process = subprocess.Popen(
            command(text, tmp_path / "killed"), cwd=PROJECT, stdout=subprocess.PIPE, stderr=-2, text=True
        )
        if attempt < 4:
            kill = _wait_for_progress(process, tmp_path / f"killed{UNFINISHED}", generator, worker=attempt == 1)
            children = psutil.Process(process.pid).children() if process.poll() is None else []
            kill()
        output, _ = process.communicate(timeout=600)
        ends.append(process.returncode)
        if attempt < 4:
            assert psutil.wait_procs(children, timeout=60)[1] == []
        if process.returncode == 0:
            break
        if attempt == 1:
            assert process.returncode == 2 and output.startswith("error: a worker was killed"), output
    assert ends == [-signal.SIGKILL, 2, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_worker_killed_while_it_writes_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker leaves half of a message; the other worker must not hold its pipe open."""
    killed, other = _Worker(), _Worker()
    try:
        killed._pipe.send(["word " * 1_000_000])  # more tokens than the buffer of a pipe holds
        assert killed._pipe.poll(60)
        killed.kill()
        monkeypatch.setattr(type(killed._pipe), "send", lambda pipe, texts: None)
        with pytest.raises(UserError, match="a worker was killed"):
            killed.encode([])
    finally:
        monkeypatch.undo()
        other.kill()
    with pytest.raises(UserError, match="a worker was killed"):
        other.encode(["text"])


def _wait_for_progress(
    process: subprocess.Popen[str], unfinished: Path, generator: random.Random, worker: bool
) -> Callable[[], None]:
    """Wait for a new note; return the function that kills the process or a worker."""
    note = unfinished / "progress.json"
    before = note.read_text() if note.exists() else None
    deadline = time.monotonic() + 60
    while not note.exists() or note.read_text() == before:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 0.2))
    if not worker:
        return process.kill
    children = psutil.Process(process.pid).children()
    return next(child.kill for child in children if "spawn_main" in " ".join(child.cmdline()))


def test_a_second_process_is_refused(tmp_path: Path, text: Path) -> None:
    process = subprocess.Popen(command(text, tmp_path / "out"), cwd=PROJECT)
    try:
        deadline = time.monotonic() + 60
        lock = tmp_path / f"out{UNFINISHED}" / "lock"
        while not lock.exists() or not lock.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it does not finish before the second starts
        second = subprocess.run(command(text, tmp_path / "out"), cwd=PROJECT, capture_output=True, text=True)
        assert second.returncode == 2 and f"in use by process {process.pid}" in second.stderr
    finally:
        process.kill()
        process.wait()


def test_a_document_without_lines_or_spaces_is_one_piece(tmp_path: Path) -> None:
    document = "".join(random.Random(1).choices("abcdefghij", k=3_000_000))
    prepared([document, "another"], tmp_path / "out", Recipe(EveryPiece(2)))
    assert tokenizer.gpt2().decode(tokens_of(tmp_path / "out", "train")[1:]) == document


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_document_of_50_megabytes_is_prepared(tmp_path: Path, kind: str) -> None:
    text = "".join(f"Line {number} of a very long document.\n" for number in range(1_500_000))
    assert len(text) > 50_000_000
    file = tmp_path / f"one.{kind}"
    file.write_text(text if kind == "txt" else json.dumps({"text": text}) + "\n", encoding="utf-8")
    prepare(local_source([file]), tmp_path / "out", Recipe(FirstTokens(1000)), workers=2, progress=False)
    val, train = (tokens_of(tmp_path / "out", split) for split in ("val", "train"))
    assert train[0] == val[0] == END
    assert tokenizer.gpt2().decode(val[1:] + train[1:]) == text


def test_the_encoder_ends_its_workers(tmp_path: Path) -> None:
    with Encoder(2) as encoder:
        texts = ((f"text {number} " * 20_000, number) for number in itertools.count())
        assert [number for number, _ in itertools.islice(encoder.encode(texts), 3)] == [0, 1, 2]
    assert psutil.Process().children() == [] or not any(
        "spawn_main" in " ".join(child.cmdline()) for child in psutil.Process().children()
    )


def test_an_existing_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepared(["one", "two"], tmp_path / "out", Recipe(EveryPiece(2)))
    shutil.rmtree(tmp_path / "out")


def test_damaged_documents_are_logged_and_counted(tmp_path: Path, heard: list[str]) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(100)]
    lines[50:50] = ["[" * 30_000, *("{}" for _ in range(30))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    dataset = prepare(local_source([tmp_path / "x.jsonl"]), tmp_path / "out", workers=1)
    assert dataset.counts == {"documents": 100, "empty": 0, "null": 0, "unreadable": 31}
    assert heard[0] == f"skipped: {tmp_path / 'x.jsonl'}, line 51: not JSON (nested too deeply)"
    assert f'skipped: {tmp_path / "x.jsonl"}, line 70: no field "text", the object is empty' in heard
    assert len(heard) == 21  # further ones are only counted


@pytest.mark.parametrize("seed", range(3))
def test_interruptions_with_damaged_documents_and_separators_do_not_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    monkeypatch.setattr(pipeline, "_NOTE_SECONDS", 0)
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


def test_an_end_of_text_in_the_text_is_logged_and_counted(tmp_path: Path, heard: list[str]) -> None:
    (tmp_path / "x.txt").write_text("<|endoftext|>".join(f"document {number}\n" * 300 for number in range(60)))
    one = prepare(local_source([tmp_path / "x.txt"]), tmp_path / "one", workers=1)
    assert one.counts == {"documents": 1, "empty": 0, "null": 0, "endoftext": 59}
    assert len(heard) == 1 and "start again with --separator '<|endoftext|>'" in heard[0]
    split = local_source([tmp_path / "x.txt"], reading=Reading(separator="<|endoftext|>"))
    many = prepare(split, tmp_path / "many", workers=1)
    assert many.counts == {"documents": 60, "empty": 0, "null": 0} and len(heard) == 1
    ends = [tokens_of(tmp_path / "many", split).count(END) for split in ("train", "val")]
    assert ends == [59, 1]


@pytest.mark.parametrize("tokens", [30, 100, 1000])
def test_a_small_limit_of_tokens_has_validation_tokens_too(tmp_path: Path, tokens: int) -> None:
    documents = [f"{number} words and more words" for number in range(400)]
    prepared(documents, tmp_path / "out", Recipe(tokens=tokens))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokens("train") + dataset.tokens("val") == tokens and 0 < dataset.tokens("val") < 0.4 * tokens


@pytest.mark.parametrize(
    ("documents", "recipe", "reason"),
    [
        (["words " * 100] * 9, Recipe(tokens=50), "--tokens 50 is too small: the first piece of text alone has more"),
        (
            ["words " * 100] * 9,
            Recipe(FirstTokens(5000)),
            "all of its 918 tokens are held out for validation; give m",
        ),
        (["words"], Recipe(), "too little text for training and validation: 1 documents with 2 tokens"),
    ],
)
def test_too_little_text_is_explained(tmp_path: Path, documents: list[str], recipe: Recipe, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prepared(documents, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    "note",
    [b"", b"\xff", b"[]", b"{}", b"[" * 30_000, b'{"format": 2}', b'{"format": 2, "identity": []}'],
    ids=range(7),
)
def test_a_damaged_note_is_an_error(tmp_path: Path, note: bytes) -> None:
    directory = tmp_path / f"out{UNFINISHED}"
    directory.mkdir()
    (directory / "progress.json").write_bytes(note)
    with pytest.raises(UserError, match=r"progress\.json is damaged: remove .*out\.unfinished to start again"):
        prepared(["one", "two"], tmp_path / "out")
    assert (directory / "progress.json").read_bytes() == note


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Prepare a file of 100 documents into ``out``, interrupt it at the 60th, and return the path of the note."""

    def run(file: Path, **options: Any) -> Path:
        monkeypatch.setattr(pipeline, "_NOTE_SECONDS", 0)
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


def convert_to_an_earlier_version(note: Path) -> None:
    content = json.loads(note.read_text())
    del content["reader"], content["counts"]["unreadable"], content["counts"]["endoftext"]
    content["identity"]["source"] = [row[:3] for row in content["identity"]["source"]]
    note.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_preparation_of_an_earlier_version_continues_or_starts_again(
    tmp_path: Path, heard: list[str], interrupted: Callable[..., Path], name: str
) -> None:
    """Parquet is read as before; text files are read differently, for example byte order marks."""
    file = write_hundred_documents(tmp_path / name)
    prepare(local_source([file]), tmp_path / "whole", workers=1)
    convert_to_an_earlier_version(interrupted(file))
    prepare(local_source([file]), tmp_path / "out", workers=1)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    restarts = [line for line in heard if "started by an earlier version" in line and "starting again" in line]
    assert len(restarts) == (name == "x.jsonl")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
@pytest.mark.parametrize("options", [{"column": "other"}, {"separator": " "}])
def test_a_preparation_does_not_continue_with_another_column_or_separator(
    tmp_path: Path, interrupted: Callable[..., Path], name: str, options: dict[str, str]
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    monkeypatch.setattr("ds_gpt2.data.prepare.chunking.PIECE_CHARACTERS", 50)
    monkeypatch.setattr(pipeline, "_NOTE_SECONDS", 0)
    documents = [
        f"line {number} of it\n" * 9 + "\ufffd\0\x01 and \x7f \t\x1b" * (number % 9 == 8) for number in range(60)
    ]
    source = listed(documents)
    dataset = prepare(source, tmp_path / "whole", workers=1)
    assert (dataset.counts["replacement"], dataset.counts["control"]) == (6, 18)
    assert [line.split(":")[0] for line in heard] == ["0, document 9, character 118", "0, document 9, character 119"]
    for after in (3, 20, 45):
        with pytest.raises(InterruptError):
            prepare(interrupting(source, after), tmp_path / "broken", workers=1)
    prepare(source, tmp_path / "broken", workers=1)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_an_error_late_in_a_file_retains_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_NOTE_SECONDS", 0)
    path = tmp_path / "x.txt"
    path.write_bytes(b"a good line of text\n" * 150_000 + "Les élèves là. ".encode("latin-1") * 60_000)
    for _ in range(2):
        with pytest.raises(UserError, match="are not valid in the encoding of its beginning"):
            prepare(local_source([path]), tmp_path / "out", workers=1)
        assert (tmp_path / "out.unfinished" / "progress.json").is_file()
    with pytest.raises(UserError, match="an unfinished dataset of other text or options"):
        prepare(local_source([path], reading=Reading(encoding="latin-1")), tmp_path / "out", workers=1)


def test_a_separator_that_does_not_occur_is_reported(tmp_path: Path, heard: list[str]) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one line of text\n" * 5000)
    for separator, hint in (("<sep>", "nothing was split"), ("\\n", "$'\\n' is a line end")):
        source = local_source([path], reading=Reading(separator=separator))
        prepare(source, tmp_path / hint[:4], workers=1)
        assert heard[-1].startswith(f"--separator {separator!r} does not occur") and heard[-1].endswith(hint)
    heard.clear()
    prepare(local_source([path], reading=Reading(separator="line\n")), tmp_path / "c", workers=1)
    prepare(local_source([path], reading=Reading(separator="of")), tmp_path / "d", workers=1)
    assert len(heard) == 1
