import gzip
import json
import random
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ds_gpt2 import tokenizer
from ds_gpt2.data.sources import LocalFile, find_text_files, python_documents
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
    assert [text for path in found for text in LocalFile(path).documents(0)] == [
        "plain é",
        "zipped",
        "first",
        "second",
        "# deep",
        "third",
    ]


def test_a_file_named_is_taken_whatever_its_ending(folder: Path) -> None:
    odd = folder / "notes"
    odd.write_text("x")
    assert find_text_files([odd]) == [odd]


def test_bytes_that_are_no_text_become_a_mark(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good \xff bad")
    assert list(LocalFile(tmp_path / "x.txt").documents(0)) == ["good \ufffd bad"]


@pytest.mark.parametrize("line", ["no json", "[]", "{}", '{"text": 1}', '{"content": "x"}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: .*\"text\""):
        list(LocalFile(tmp_path / "x.jsonl").documents(0))


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read"):
        list(LocalFile(tmp_path / "x.txt.gz").documents(0))
    damaged = bytearray(gzip.compress(b"text of some kind" * 1000))
    damaged[20:40] = bytes(20)
    (tmp_path / "x.txt.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read"):
        list(LocalFile(tmp_path / "x.txt.gz").documents(0))
    (tmp_path / "y.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"y\.txt\.gz cannot be read"):
        list(LocalFile(tmp_path / "y.txt.gz").documents(0))


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


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows in row groups of three."""
    texts = [None if number == 4 else f"row {number}" for number in range(10)]
    parquet.write_table(
        pyarrow.table({"text": texts, "score": list(range(10))}), tmp_path / "x.parquet", row_group_size=3
    )
    return tmp_path / "x.parquet"


@pytest.mark.parametrize("skip", range(12))
def test_a_part_can_be_begun_anywhere(table: Path, skip: int) -> None:
    rows = list(LocalFile(table).documents(0))
    assert rows[3:6] == ["row 3", None, "row 5"] and len(rows) == 10
    assert list(LocalFile(table).documents(skip)) == rows[skip:]
    lines = table.with_name("x.jsonl")
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert list(LocalFile(lines).documents(skip)) == rows[skip:]


def test_a_parquet_file_is_told_what_is_wrong_with_it(table: Path) -> None:
    with pytest.raises(UserError, match=r"x\.parquet has no column 'content' but text, score: give --column"):
        list(LocalFile(table, "content").documents(0))
    with pytest.raises(UserError, match=r"column 'score' holds int64, not text"):
        list(LocalFile(table, "score").documents(0))
    whole = table.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        table.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"x\.parquet cannot be read as parquet"):
            list(LocalFile(table).documents(0))


def test_text_in_parquet_that_is_no_utf8_becomes_a_mark(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"b\xffd", None], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    assert list(LocalFile(tmp_path / "x.parquet").documents(0)) == ["good", "b\ufffdd", None]


def test_zstandard_is_unpacked_whatever_its_frames(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress
    text = "".join(f"line {number} é\n" for number in range(100_000))
    half = len(text) // 2
    path = tmp_path / "x.txt.zst"
    path.write_bytes(packed(text[:half].encode()) + packed(text[half:].encode()))
    assert ["".join(document or "") for document in LocalFile(path).documents(0)] == [text]
    for broken in (path.read_bytes()[:-5], path.read_bytes()[:-5] + bytes(100), b"no zstandard"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"x\.txt\.zst cannot be read"):
            list(map("".join, LocalFile(path).documents(0)))


def test_a_field_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "one"}\n')
    assert list(LocalFile(tmp_path / "x.jsonl", "content").documents(0)) == ["one"]


def test_a_parquet_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Nor one row group of it: there are files that have no more than one."""
    dice = random.Random(0)
    rows = ["".join(dice.choices("abcdefgh ", k=10_000)) for _ in range(4000)]
    table, plain = pyarrow.table({"text": rows}), {"compression": "none", "use_dictionary": False}
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4000, **plain)
    del rows, table
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in LocalFile(tmp_path / "x.parquet").documents(0):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 25_000_000, f"{most:,} bytes of 40 MB"
