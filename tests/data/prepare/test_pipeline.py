"""Preparation of datasets: tokens, splits, counts, limits, killed commands."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import PROJECT
from prepare_helpers import END, content_of, joined, prepared, tokens_of

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import INDEX, UNFINISHED, open_dataset
from ds_gpt2.data.prepare.holdout import EveryPiece, FirstTokens
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Reading, Source, local_source

PROGRAM = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]  # as launch.sh does


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


@pytest.mark.slow
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


def _wait_for_progress(
    process: subprocess.Popen[str], unfinished: Path, generator: random.Random, worker: bool
) -> Callable[[], None]:
    """Wait for a new record of progress; return the function that kills the process or a worker."""
    file = unfinished / "progress.json"
    before = file.read_text() if file.exists() else None
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text() == before:
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


@pytest.mark.slow
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


def test_an_existing_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepared(["one", "two"], tmp_path / "out", Recipe(EveryPiece(2)))
    shutil.rmtree(tmp_path / "out")


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
            "all of it, 918 tokens, is held out for validation; give m",
        ),
        (
            ["words"],
            Recipe(),
            "too little text for training and validation: 1 document with 2 tokens, but at least two",
        ),
    ],
)
def test_too_little_text_is_explained(tmp_path: Path, documents: list[str], recipe: Recipe, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prepared(documents, tmp_path / "out", recipe)


def test_a_separator_that_does_not_occur_is_reported(tmp_path: Path, log_messages: list[str]) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one line of text\n" * 5000)
    for separator, hint in (("<sep>", "nothing was split"), ("\\n", "$'\\n' is a line end")):
        source = local_source([path], reading=Reading(separator=separator))
        prepare(source, tmp_path / hint[:4], workers=1)
        assert log_messages[-1].startswith(f"--separator {separator!r} does not occur") and log_messages[-1].endswith(
            hint
        )
    log_messages.clear()
    prepare(local_source([path], reading=Reading(separator="line\n")), tmp_path / "c", workers=1)
    prepare(local_source([path], reading=Reading(separator="of")), tmp_path / "d", workers=1)
    assert len(log_messages) == 1
