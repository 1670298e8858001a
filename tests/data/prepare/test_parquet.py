"""Documents from parquet files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pytest
from prepare_helpers import read
from pyarrow import parquet

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.sources import LocalFile


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_all_string_types_of_parquet_are_read(tmp_path: Path, kind: str) -> None:
    texts = ["one", None, "two", "one"] * 9
    array = pyarrow.array(texts).dictionary_encode() if kind == "dictionary" else pyarrow.array(texts, kind)
    parquet.write_table(pyarrow.table({"text": array, "id": range(36)}), tmp_path / "x.parquet", row_group_size=5)
    assert read(tmp_path / "x.parquet") == texts
    assert list(LocalFile(tmp_path / "x.parquet").documents(7)) == texts[7:]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["c"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text", "other"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has 2 columns 'text'"):
        read(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", column="other") == ["c"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write ten rows in row groups of three."""
    texts = [None if number == 4 else f"row {number}" for number in range(10)]
    parquet.write_table(
        pyarrow.table({"text": texts, "score": list(range(10))}), tmp_path / "x.parquet", row_group_size=3
    )
    return tmp_path / "x.parquet"


@pytest.mark.parametrize("skip", range(12))
def test_a_part_can_be_read_from_any_document(table: Path, skip: int) -> None:
    rows = list(LocalFile(table).documents(0))
    assert rows[3:6] == ["row 3", None, "row 5"] and len(rows) == 10
    assert list(LocalFile(table).documents(skip)) == rows[skip:]
    lines = table.with_name("x.jsonl")
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert list(LocalFile(lines).documents(skip)) == rows[skip:]


def test_invalid_parquet_files_are_errors(table: Path) -> None:
    with pytest.raises(UserError, match=r"x\.parquet has no column 'content'; it has text, score: give --column"):
        list(LocalFile(table, "content").documents(0))
    with pytest.raises(UserError, match=r"column 'score' is of type int64, not text"):
        list(LocalFile(table, "score").documents(0))
    whole = table.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        table.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"x\.parquet cannot be read as parquet"):
            list(LocalFile(table).documents(0))


def test_invalid_utf8_in_parquet_is_replaced(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"b\xffd", None], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    assert list(LocalFile(tmp_path / "x.parquet").documents(0)) == ["good", "b\ufffdd", None]


@pytest.mark.slow
def test_a_parquet_file_is_read_in_small_parts(tmp_path: Path) -> None:
    """Not by row groups, because some files have only one."""
    generator = random.Random(0)
    rows = ["".join(generator.choices("abcdefgh ", k=10_000)) for _ in range(4000)]
    table, plain = pyarrow.table({"text": rows}), {"compression": "none", "use_dictionary": False}
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4000, **plain)
    del rows, table
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in LocalFile(tmp_path / "x.parquet").documents(0):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 25_000_000, f"{most:,} bytes of 40 MB"
