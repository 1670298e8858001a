"""Files compressed with gzip and Zstandard."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard
from prepare_helpers import read

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.documents import Document, Unreadable
from ds_gpt2.data.prepare.sources import LocalFile


def text_of(document: Document) -> str:
    assert document is not None and not isinstance(document, Unreadable)
    return "".join(document)


def test_gzip_members_are_concatenated_and_other_data_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert read(path) == ["one", "two"]
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read: other data follows its gzip data"):
        read(path)


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


def test_zstandard_frames_are_concatenated_and_truncation_is_an_error(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress
    text = "".join(f"line {number} é\n" for number in range(100_000))
    half = len(text) // 2
    path = tmp_path / "x.txt.zst"
    path.write_bytes(packed(text[:half].encode()) + packed(text[half:].encode()))
    assert [text_of(document) for document in LocalFile(path).documents(0)] == [text]
    for broken in (path.read_bytes()[:-5], path.read_bytes()[:-5] + bytes(100), b"no zstandard"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"x\.txt\.zst cannot be read"):
            list(map(text_of, LocalFile(path).documents(0)))


@pytest.mark.parametrize("position", [-8, -4])
def test_a_wrong_gzip_checksum_is_an_error(tmp_path: Path, position: int) -> None:
    packed = bytearray(gzip.compress(b"text of some kind\n" * 1000))
    packed[position] ^= 1
    (tmp_path / "x.txt.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"x\.txt\.gz cannot be read: it is damaged \((CRC|Incorrect length)"):
        read(tmp_path / "x.txt.gz")
