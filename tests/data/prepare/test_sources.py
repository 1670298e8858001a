"""Sources of documents: directories, file names, the sample."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from prepare_helpers import read

from ds_gpt2.data import tokenizer
from ds_gpt2.data.prepare.files import find_files
from ds_gpt2.data.prepare.sources import LocalFile, Reading, local_source, python_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("plain é", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("# deep", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("zipped")
    (tmp_path / "d.jsonl").write_text('{"text": "first", "id": 1}\n\n{"text": "second"}\n', encoding="utf-8")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "third"}\n')
    return tmp_path


def test_all_text_files_of_a_directory_are_read(folder: Path) -> None:
    found = [each.path for each in find_files([folder])]
    assert [path.name for path in found] == ["b.txt", "c.txt.gz", "d.jsonl", "a.md", "e.jsonl.gz"]
    assert [text for path in found for text in LocalFile(path).documents(0)] == [
        "plain é",
        "zipped",
        "first",
        "second",
        "# deep",
        "third",
    ]


def test_a_file_given_by_name_may_have_any_suffix(folder: Path) -> None:
    odd = folder / "notes"
    odd.write_text("x")
    assert [each.path for each in find_files([odd])] == [odd]


def test_a_json_file_in_a_directory_is_read_if_it_is_json_lines(tmp_path: Path, log_messages: list[str]) -> None:
    (tmp_path / "corpus.json").write_text('{"text": "one"}\n')
    (tmp_path / "package.json").write_text('{"name": "x"}\n')
    assert [part.name for part in local_source([tmp_path]).parts] == [str(tmp_path / "corpus.json")]
    assert [line for line in log_messages if "package.json" in line and "left out" in line]


def test_a_file_name_may_have_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xe4me.txt")
    path.write_text("text")
    assert read(path) == ["text"]
    assert local_source([path]).name == "n\\udce4me.txt"


@pytest.mark.slow
def test_the_sample_is_indented_by_one_space_per_level() -> None:
    sources = [text for text in python_documents() if "class Random(" in text]
    assert len(sources) == 1
    assert "\nclass Random(" in sources[0]
    assert "\n def " in sources[0]
    assert "\n    def " not in sources[0]


@pytest.mark.slow
def test_the_sample_has_three_million_tokens() -> None:
    encoding = tokenizer.gpt2()
    assert sum(map(len, encoding.encode_ordinary_batch(list(python_documents()), num_threads=2))) > 3_000_000


def test_json_files_left_out_are_counted(tmp_path: Path, log_messages: list[str]) -> None:
    for number in range(60):
        (tmp_path / f"{number}.json").write_text('{"name": "x"}')
    (tmp_path / "a.txt").write_text("text")
    local_source([tmp_path])
    assert len([line for line in log_messages if "left out" in line]) == 6
    assert log_messages[-1] == "and 55 more .json files left out"


def test_a_format_has_no_effect_on_files_of_directories(tmp_path: Path, log_messages: list[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    local_source([tmp_path], reading=Reading(form="jsonl"))
    assert [line for line in log_messages if line.startswith("--format jsonl has no effect")]
    log_messages.clear()
    local_source([tmp_path / "a.txt", tmp_path], reading=Reading(form="text"))
    assert not log_messages or "no effect" not in log_messages[0]
