import gzip
from pathlib import Path

import pytest

from ds_gpt2 import tokenizer
from ds_gpt2.data.sources import find_text_files, python_documents, text_documents
from ds_gpt2.errors import UserError


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


def test_a_directory_is_searched_for_text(folder: Path) -> None:
    found = find_text_files([folder])
    assert [path.name for path in found] == ["b.txt", "c.txt.gz", "d.jsonl", "a.md", "e.jsonl.gz"]
    assert list(text_documents(found)) == ["plain é", "zipped", "first", "second", "# deep", "third"]


def test_a_file_named_is_taken_whatever_its_ending(folder: Path) -> None:
    odd = folder / "notes"
    odd.write_text("x")
    assert find_text_files([odd]) == [odd]


def test_bytes_that_are_no_text_become_a_mark(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good \xff bad")
    assert list(text_documents([tmp_path / "x.txt"])) == ["good \ufffd bad"]


@pytest.mark.parametrize("line", ["no json", "[]", "{}", '{"text": 1}', '{"content": "x"}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: .*\"text\""):
        list(text_documents([tmp_path / "x.jsonl"]))


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read"):
        list(text_documents([tmp_path / "x.txt.gz"]))
    damaged = bytearray(gzip.compress(b"text of some kind" * 1000))
    damaged[20:40] = bytes(20)
    (tmp_path / "x.txt.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read"):
        list(text_documents([tmp_path / "x.txt.gz"]))
    (tmp_path / "y.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"y\.txt\.gz cannot be read"):
        list(text_documents([tmp_path / "y.txt.gz"]))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text file"):
        find_text_files([tmp_path / "gone.txt"])
    with pytest.raises(UserError, match="no text found"):
        find_text_files([tmp_path])


def test_the_sample_has_indentation_of_one_space_a_level() -> None:
    sources = [text for text in python_documents() if "class Random(" in text]
    assert len(sources) == 1
    assert "\nclass Random(" in sources[0]
    assert "\n def " in sources[0]
    assert "\n    def " not in sources[0]


def test_every_python_has_three_million_tokens() -> None:
    encoding = tokenizer.gpt2()
    assert sum(map(len, encoding.encode_ordinary_batch(list(python_documents()), num_threads=2))) > 3_000_000
