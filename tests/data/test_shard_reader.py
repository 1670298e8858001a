"""Shards that fail during training: real files with injected I/O errors."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import shard_reader as module
from ds_gpt2.data.shard_reader import ShardReader
from ds_gpt2.data.shards import header_of


def _shard(path: Path, first: int, tokens: int = 1000) -> Path:
    content = np.arange(first, first + tokens, dtype="<u2")
    if path.suffix == ".npy":
        np.save(path, content)
    else:
        path.write_bytes(header_of(tokens) + content.tobytes())
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [_shard(tmp_path / "a.bin", 0), _shard(tmp_path / "b.npy", 5000), _shard(tmp_path / "c.bin", 9000)]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip the pauses between retries and record them, in seconds."""
    pauses: list[float] = []
    monkeypatch.setattr(ShardReader, "_wait", lambda _, seconds: pauses.append(seconds) or True)
    return pauses


def _read(reader: ShardReader, number: int, first: int, count: int = 10) -> list[int]:
    into = np.zeros(count, np.uint16)
    reader.read(number, first, into)
    return into.tolist()


def _failing(times: int, error: int) -> Callable[..., int]:
    """Return an ``os.preadv`` whose first ``times`` calls fail."""
    real, left = os.preadv, [times]

    def preadv(*arguments: object) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return real(*arguments)  # type: ignore[arg-type]  # passed through

    return preadv


def test_any_range_of_any_shard_can_be_read(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    for number, start in ((0, 0), (1, 5000), (2, 9000), (0, 0)):
        for first in (0, 1, 500, 990):
            assert _read(reader, number, first) == list(range(start + first, start + first + 10))


def test_short_reads_are_joined(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: real(file, [into[0][:3]], offset))
    assert _read(ShardReader(shards), 1, 7, 50) == list(range(5007, 5057))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_disk_error_is_logged_and_retried(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, no_pauses: list[float], error: int
) -> None:
    warnings: list[str] = []
    reader = ShardReader(shards, warnings.append)
    monkeypatch.setattr(os, "preadv", _failing(2, error))
    assert _read(reader, 1, 20) == list(range(5020, 5030))
    assert warnings == [
        f"shard {shards[1]} cannot be read: {os.strerror(error)}; retrying in {s} s" for s in ("0.5", "1")
    ]
    assert no_pauses == [0.5, 1]


def test_a_missing_file_is_retried_until_it_is_back(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    moved = shards[2].with_name("moved")
    shards[2].rename(moved)
    monkeypatch.setattr(ShardReader, "_wait", lambda *_: moved.rename(shards[2]) is not None)
    warnings: list[str] = []
    assert _read(ShardReader(shards, warnings.append), 2, 3) == list(range(9003, 9013))
    assert len(warnings) == 1 and "No such file" in warnings[0]


def test_retries_end_after_two_minutes(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(os, "preadv", _failing(1000, errno.EIO))
    with pytest.raises(UserError, match=rf"{shards[0].name} cannot be read: Input/output error; retried for 128 s"):
        _read(ShardReader(shards, warnings.append), 0, 0)
    assert sum(no_pauses) == pytest.approx(127.5) and len(warnings) == len(no_pauses)


def test_a_stop_request_ends_the_retries(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    answers = iter([False, True])
    monkeypatch.setattr(os, "preadv", _failing(1000, errno.EIO))
    with pytest.raises(UserError, match="Input/output error; not retried because a stop was requested"):
        _read(ShardReader(shards, warnings.append, lambda: next(answers)), 0, 0)
    assert len(warnings) == 1


def test_a_truncated_shard_is_an_error(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    _read(reader, 0, 0)
    os.truncate(shards[0], 1024 + 2 * 600)
    with pytest.raises(UserError, match=rf"{shards[0].name} was changed"):
        _read(reader, 0, 900)


def test_reading_beyond_the_end_of_a_file_is_an_error(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system still reports the old size of a truncated file."""
    reader = ShardReader(shards)
    monkeypatch.setattr(module, "_stamp", lambda file: (0, 0))
    os.truncate(shards[0], 1024 + 2 * 600)
    shards[0].open("ab").close()
    monkeypatch.setattr(module, "start_of", lambda path: 1024)
    with pytest.raises(UserError, match=rf"{shards[0].name} is truncated at byte {1024 + 2 * 600}"):
        _read(reader, 0, 595)


def test_a_modified_shard_is_an_error(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    _read(reader, 0, 0)
    with shards[0].open("r+b") as file:
        file.seek(1500)
        file.write(b"xx")
    os.utime(shards[0], ns=(0, 12345))
    with pytest.raises(UserError, match=rf"{shards[0].name} was changed during training"):
        _read(reader, 0, 500)


def test_the_number_of_open_files_is_limited(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN_FILES", 2)
    gc.collect()  # closes files of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(shards)
    for number in (0, 1, 2, 0, 1, 2):
        _read(reader, number, 0)
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # two shards and their directory
    del reader
    assert len(os.listdir("/proc/self/fd")) == before
