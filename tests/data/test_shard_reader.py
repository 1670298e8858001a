"""Shards that fail while they are trained on: real files, errors put in where a disk would make them."""

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
    """The pauses that there would have been, in seconds."""
    pauses: list[float] = []
    monkeypatch.setattr(ShardReader, "_wait", lambda _, seconds: pauses.append(seconds) or True)
    return pauses


def _read(reader: ShardReader, number: int, first: int, count: int = 10) -> list[int]:
    into = np.zeros(count, np.uint16)
    reader.read(number, first, into)
    return into.tolist()


def _failing(times: int, error: int) -> Callable[..., int]:
    """``os.preadv`` that fails so many times at first."""
    real, left = os.preadv, [times]

    def preadv(*arguments: object) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return real(*arguments)  # type: ignore[arg-type]  # passed on

    return preadv


def test_any_stretch_of_any_shard(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    for number, start in ((0, 0), (1, 5000), (2, 9000), (0, 0)):
        for first in (0, 1, 500, 990):
            assert _read(reader, number, first) == list(range(start + first, start + first + 10))


def test_what_comes_in_bits_is_put_together(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda file, into, place: real(file, [into[0][:3]], place))
    assert _read(ShardReader(shards), 1, 7, 50) == list(range(5007, 5057))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_is_told_and_tried_again(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, no_pauses: list[float], error: int
) -> None:
    told: list[str] = []
    reader = ShardReader(shards, told.append)
    monkeypatch.setattr(module.os, "preadv", _failing(2, error))
    assert _read(reader, 1, 20) == list(range(5020, 5030))
    assert told == [f"shard {shards[1]} cannot be read: {os.strerror(error)}; again in {s} s" for s in ("0.5", "1")]
    assert no_pauses == [0.5, 1]


def test_a_file_that_goes_away_and_comes_back_is_waited_for(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shards[2].with_name("moved")
    shards[2].rename(moved)
    monkeypatch.setattr(ShardReader, "_wait", lambda *_: moved.rename(shards[2]) is not None)
    told: list[str] = []
    assert _read(ShardReader(shards, told.append), 2, 3) == list(range(9003, 9013))
    assert len(told) == 1 and "No such file" in told[0]


def test_after_two_minutes_it_is_given_up(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    told: list[str] = []
    monkeypatch.setattr(module.os, "preadv", _failing(1000, errno.EIO))
    with pytest.raises(UserError, match=rf"{shards[0].name} cannot be read: Input/output error; tried for 128 seconds"):
        _read(ShardReader(shards, told.append), 0, 0)
    assert sum(no_pauses) == pytest.approx(127.5) and len(told) == len(no_pauses)


def test_a_stop_ends_the_waiting(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    asked = iter([False, True])
    monkeypatch.setattr(module.os, "preadv", _failing(1000, errno.EIO))
    with pytest.raises(UserError, match="Input/output error, and the run is to stop"):
        _read(ShardReader(shards, told.append, lambda: next(asked)), 0, 0)
    assert len(told) == 1


def test_a_shard_that_is_cut_is_named_and_gives_no_tokens(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    _read(reader, 0, 0)
    os.truncate(shards[0], 1024 + 2 * 600)
    with pytest.raises(UserError, match=rf"{shards[0].name} was changed"):
        _read(reader, 0, 900)


def test_the_end_of_a_file_is_never_taken_for_tokens(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that tells of the cut late: the size is as it was, the content is not there."""
    reader = ShardReader(shards)
    monkeypatch.setattr(module, "_stamp", lambda file: (0, 0))
    os.truncate(shards[0], 1024 + 2 * 600)
    shards[0].open("ab").close()
    monkeypatch.setattr(module, "start_of", lambda path: 1024)
    with pytest.raises(UserError, match=rf"{shards[0].name} ends at byte {1024 + 2 * 600}, too early"):
        _read(reader, 0, 595)


def test_a_shard_that_is_written_to_is_named(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    _read(reader, 0, 0)
    with shards[0].open("r+b") as file:
        file.seek(1500)
        file.write(b"xx")
    os.utime(shards[0], ns=(0, 12345))
    with pytest.raises(UserError, match=rf"{shards[0].name} was changed while it is trained on"):
        _read(reader, 0, 500)


def test_no_more_files_are_open_than_may_be(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 2)
    gc.collect()  # what earlier tests have left open
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(shards)
    for number in (0, 1, 2, 0, 1, 2):
        _read(reader, number, 0)
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # with their directory
    del reader
    assert len(os.listdir("/proc/self/fd")) == before
