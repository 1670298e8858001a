"""Encodings, byte order marks, invalid bytes, binary files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from prepare_helpers import read

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.decoding import count_control_characters, open_text
from ds_gpt2.data.prepare.sources import LocalFile, local_source


def test_invalid_bytes_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good \xff bad")
    assert list(LocalFile(tmp_path / "x.txt").documents(0)) == ["good \ufffd bad"]


ROWS = [{"text": f"Zeile {number} mit é und \u20ac", "id": number} for number in range(9)]


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_determines_the_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES.replace("\n", end).encode(encoding))
    assert read(tmp_path / "x.jsonl") == [row["text"] for row in ROWS]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(LINES.replace("\n", end).encode(encoding)))
    assert read(tmp_path / "x.txt.gz") == [LINES]


def test_byte_order_marks_are_removed_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(2 * LINES.encode("utf-8-sig"))  # concatenated files
    assert read(path) == 2 * [row["text"] for row in ROWS]
    path.write_bytes(LINES.encode("utf-16"))
    assert read(path, encoding="utf-16-le") == [row["text"] for row in ROWS]


def test_another_encoding_must_be_given(tmp_path: Path, log_messages: list[str]) -> None:
    text = "Les élèves étaient là. " * 50
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"x\.txt: 200 of the first 1,150 characters are not valid UTF-8: give its --enc"
    ):
        read(path)
    assert read(path, encoding="latin-1") == [text]
    assert log_messages == []
    assert read(path, encoding="utf-8") == [text.translate({ord(letter): "\ufffd" for letter in "éèà"})]
    assert len(log_messages) == 1 and "200 of the first 1,150 characters" in log_messages[0]
    with pytest.raises(UserError, match="unknown --encoding 'klingon'"):
        read(path, encoding="klingon")
    path.write_bytes(b"\xef\xbb\xbfmarked")
    assert read(path, encoding="utf-8") == ["marked"]


@pytest.mark.parametrize(
    "name", ["x.txt", "x.md", "noending", "x.jsonl", "x.json", "x.txt.gz", "x.parquet", "x.jsonl.zst"]
)
def test_binary_files_are_errors_before_anything_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (random.Random(1).randbytes(50_000), b"PK\x03\x04" + b"name" * 99, ("x\n" * 99).encode("utf-16-le")):
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(UserError, match=rf"{name} (is not text|cannot be read)"):
            local_source([path])


def test_a_nul_or_half_a_surrogate_pair_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a line of text\n" * 99 + b"\0")
    assert read(tmp_path / "x.txt") == ["a line of text\n" * 99 + "\0"]
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud800"}\n{"text": "nul \\u0000"}\n{"text": null}\n')
    assert read(tmp_path / "x.jsonl") == ["half \ud800", "nul \0", None]


def write_with_tail(path: Path, tail: bytes) -> Path:
    """Write 3 MB of valid text followed by ``tail``."""
    path.write_bytes(b"a good line of text\n" * 150_000 + tail)
    return path


def contents(path: Path, **options: Any) -> str:
    return "".join(map(str, read(path, **options)))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_another_encoding_after_the_beginning_is_an_error(tmp_path: Path, name: str) -> None:
    lines = "Les élèves étaient là. " * 30_000
    path = tmp_path / name
    if name == "x.txt":
        write_with_tail(path, lines.encode("latin-1"))
    else:
        good, bad = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("good " * 200, lines[:900]))
        path.write_bytes(good.encode() * 3000 + bad.encode("latin-1") * 700)
    with pytest.raises(UserError, match=rf"{name}: [\d,]+ of characters [\d,]+ to [\d,]+ are not valid in the enc"):
        contents(path)
    assert "\ufffd" in contents(path, encoding="utf-8")


def test_binary_data_after_the_beginning_is_an_error(tmp_path: Path) -> None:
    path = write_with_tail(tmp_path / "x.txt", random.Random(1).randbytes(500_000))
    for encoding in (None, "utf-8", "latin-1"):
        with pytest.raises(UserError, match=r"x\.txt(: [\d,]+ of characters| is not text: [\d,]+ of characters)"):
            contents(path, encoding=encoding)
    assert "\0" in contents(write_with_tail(path, bytes(9)))


def test_invalid_bytes_are_replaced_as_python_does(tmp_path: Path) -> None:
    generator = random.Random(2)
    for encoding in ("utf-8", "utf-16-le", "utf-32-be", "gb18030", "cp1252", "ascii"):
        for _ in range(20):
            raw = b"text\n" * 9 + generator.randbytes(40) + "é\ufffd€".encode("utf-8")
            (tmp_path / "x.txt").write_bytes(raw)
            with open_text(tmp_path / "x.txt", "", encoding) as file:
                found = file.read()
            with (tmp_path / "x.txt").open(encoding=encoding, errors="replace") as file:
                assert found == file.read()


@pytest.mark.parametrize("end", [40, 0x7F, 3000, 0x1FFFF])
def test_control_characters_are_counted(end: int) -> None:
    generator = random.Random(end)
    for _ in range(50):
        text = "".join(
            chr(generator.choice((generator.randrange(34), generator.randrange(end + 1)))) for _ in range(60)
        )
        expected = sum((each < " " and each not in "\t\n\v\f\r\b\x1a\x1b") or each == "\x7f" for each in text)
        assert count_control_characters(text) == expected


@pytest.mark.parametrize(
    "encoding",
    ["idna", "punycode", "undefined", "rot13", "hex", "base64", "unicode_escape", "raw-unicode-escape", "zip", "a\0b"],
)
def test_only_text_encodings_are_accepted(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(UserError, match="unknown --encoding "):
        read(tmp_path / "x.txt", encoding=encoding)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_utf_16_without_a_byte_order_mark_requires_the_byte_order(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(LINES.encode(f"{encoding}-le"))
        with pytest.raises(UserError, match=f"{name} has no byte order mark.*give {encoding}-le or {encoding}-be"):
            read(path, encoding=encoding)
        assert len(read(path, encoding=f"{encoding}-le")) in (1, 9)
        path.write_bytes(LINES.encode("utf-8"))
        for name_given in (encoding, f"{encoding}-le", f"{encoding}-be"):
            with pytest.raises(UserError, match=rf"{name} is UTF-8 or ASCII, not .*: omit --encoding {name_given}"):
                read(path, encoding=name_given)
