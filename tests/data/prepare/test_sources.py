import gzip
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.prepare.decoding import count_control_characters, open_text
from ds_gpt2.data.prepare.documents import Document, Unreadable
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


def test_invalid_bytes_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good \xff bad")
    assert list(LocalFile(tmp_path / "x.txt").documents(0)) == ["good \ufffd bad"]


def read(path: Path, **options: Any) -> list[Document]:
    """Return all documents of one file as ``prepare text`` reads them; blocks are joined."""
    (part,) = local_source([path], reading=Reading(**options)).parts
    return [
        document if document is None or isinstance(document, str | Unreadable) else "".join(document)
        for document in part.documents(0)
    ]


DEEP = '{"text": ' + "[" * 20_000 + "]" * 20_000 + "}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[]", "not a JSON object but a list"),
        ("null", "not a JSON object but null"),
        ("{}", 'no field "text", the object is empty'),
        ('{"text": 1}', 'field "text" is a number, not a string'),
        ('{"content": "x", "id": 1}', 'no field "text", it has "content", "id": give --column NAME'),
        (DEEP, "not JSON (nested too deeply)"),
    ],
    ids=lambda value: value[:10],
)
def test_an_invalid_line_is_one_unreadable_document(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + '\n{"text": "one"}\n{"text": "two"}\n')
    assert read(path) == [Unreadable(f"{path}, line 1: {reason}"), "one", "two"]
    assert next(iter(local_source([path]).parts)).documents(1).__next__() == "one"
    path.write_text('{"text": "one"}\n' + line + "\n" + line)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {reason}")):
        local_source([path])


def test_a_json_array_or_object_is_an_error_with_a_command_to_convert_it(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}"} for number in range(9)]
    for content in (json.dumps(rows), json.dumps(rows, indent=1), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json is one JSON array.*jq -c '\.\[\]'"):
            local_source([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text(json.dumps({"text": "x"}, indent=1))
    with pytest.raises(UserError, match=r"x\.json, line 1: not JSON .*jq -c \. "):
        local_source([tmp_path / "x.json"])


def test_a_json_file_in_a_directory_is_read_if_it_is_json_lines(tmp_path: Path, heard: list[str]) -> None:
    (tmp_path / "corpus.json").write_text('{"text": "one"}\n')
    (tmp_path / "package.json").write_text('{"name": "x"}\n')
    assert [part.name for part in local_source([tmp_path]).parts] == [str(tmp_path / "corpus.json")]
    assert [line for line in heard if "package.json" in line and "left out" in line]


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


def test_another_encoding_must_be_given(tmp_path: Path, heard: list[str]) -> None:
    text = "Les élèves étaient là. " * 50
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"x\.txt: 200 of the first 1,150 characters are not valid UTF-8: give its --enc"
    ):
        read(path)
    assert read(path, encoding="latin-1") == [text]
    assert heard == []
    assert read(path, encoding="utf-8") == [text.translate({ord(letter): "\ufffd" for letter in "éèà"})]
    assert len(heard) == 1 and "200 of the first 1,150 characters" in heard[0]
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


def test_a_file_name_may_have_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xe4me.txt")
    path.write_text("text")
    assert read(path) == ["text"]
    assert local_source([path]).name == "n\\udce4me.txt"


def test_a_nul_or_half_a_surrogate_pair_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a line of text\n" * 99 + b"\0")
    assert read(tmp_path / "x.txt") == ["a line of text\n" * 99 + "\0"]
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud800"}\n{"text": "nul \\u0000"}\n{"text": null}\n')
    assert read(tmp_path / "x.jsonl") == ["half \ud800", "nul \0", None]


def test_gzip_members_are_concatenated_and_other_data_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert read(path) == ["one", "two"]
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read: other data follows its gzip data"):
        read(path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one<sep>two<sep>three", ["one", "two", "three"]),
        ("<sep><sep>x", ["", "", "x"]),
        ("x" * 3_000_000 + "<sep>" + "y" * 2_500_000 + "<sep>z", ["x" * 3_000_000, "y" * 2_500_000, "z"]),
        # Across the ends of blocks, which are 2 ** 20 characters.
        *((f"{'x' * (2**22 - cut)}<sep>two", ["x" * (2**22 - cut), "two"]) for cut in range(7)),
    ],
    ids=len,
)
def test_a_separator_splits_a_text_into_documents(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "x.txt").write_text(text)
    assert read(tmp_path / "x.txt", separator="<sep>") == parts
    (part,) = local_source([tmp_path / "x.txt"], reading=Reading(separator="<sep>")).parts
    for skip in range(len(parts)):
        assert ["".join(document or "") for document in part.documents(skip)] == parts[skip:]  # type: ignore[arg-type]  # text parts yield str or None


def test_a_separator_splits_lines_and_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a|b", None, "c"]}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"text": "a|b"}\n{"text": null}\n{"text": "c"}\n')
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        assert read(path, separator="|") == ["a", "b", None, "c"]


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


def test_zstandard_with_a_long_window_is_unpacked(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(packer.compress(b"some text") + packer.flush())
    assert read(tmp_path / "x.txt.zst") == ["some text"]


def test_a_damaged_gzip_file_is_an_error(tmp_path: Path) -> None:
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


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text file"):
        find_files([tmp_path / "gone.txt"])
    with pytest.raises(UserError, match="no text found"):
        find_files([tmp_path])


def test_the_sample_is_indented_by_one_space_per_level() -> None:
    sources = [text for text in python_documents() if "class Random(" in text]
    assert len(sources) == 1
    assert "\nclass Random(" in sources[0]
    assert "\n def " in sources[0]
    assert "\n    def " not in sources[0]


def test_the_sample_has_three_million_tokens() -> None:
    encoding = tokenizer.gpt2()
    assert sum(map(len, encoding.encode_ordinary_batch(list(python_documents()), num_threads=2))) > 3_000_000


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


def test_zstandard_frames_are_concatenated_and_truncation_is_an_error(tmp_path: Path) -> None:
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


def test_a_field_of_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "one"}\n')
    assert list(LocalFile(tmp_path / "x.jsonl", "content").documents(0)) == ["one"]


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


@pytest.mark.parametrize("position", [-8, -4])
def test_a_wrong_gzip_checksum_is_an_error(tmp_path: Path, position: int) -> None:
    packed = bytearray(gzip.compress(b"text of some kind\n" * 1000))
    packed[position] ^= 1
    (tmp_path / "x.txt.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read: it is damaged \((CRC|Incorrect length)"):
        read(tmp_path / "x.txt.gz")


def test_json_files_left_out_are_counted(tmp_path: Path, heard: list[str]) -> None:
    for number in range(60):
        (tmp_path / f"{number}.json").write_text('{"name": "x"}')
    (tmp_path / "a.txt").write_text("text")
    local_source([tmp_path])
    assert len([line for line in heard if "left out" in line]) == 6
    assert heard[-1] == "and 55 more .json files left out"


def test_a_format_has_no_effect_on_files_of_directories(tmp_path: Path, heard: list[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    local_source([tmp_path], reading=Reading(form="jsonl"))
    assert [line for line in heard if line.startswith("--format jsonl has no effect")]
    heard.clear()
    local_source([tmp_path / "a.txt", tmp_path], reading=Reading(form="text"))
    assert not heard or "no effect" not in heard[0]
