"""Files are replaced atomically, also by several processes at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import check_writable, replace_file


def test_check_writable_creates_the_directory_or_raises_an_error(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below")


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("old")
    with file.open() as reader:
        replace_file(file, "new")
        assert (reader.read(), file.read_text()) == ("old", "new")

    def fail(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(file, "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "new")]


class _Source:
    """A file with two blocks; ``during`` is called before the second one is read."""

    def __init__(self, during: Callable[[], object]) -> None:
        self._blocks = self._read(during)

    def read(self, size: int = -1) -> bytes:
        return next(self._blocks, b"")

    @staticmethod
    def _read(during: Callable[[], object]) -> Iterator[bytes]:
        yield b"first "
        during()
        yield b"last"


def test_two_processes_that_replace_a_file_at_once_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    source: Any = _Source(lambda: replace_file(file, "of the other process"))
    replace_file(file, source)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "first last")]


def test_an_interrupted_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    source: Any = _Source(interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "config.yaml", source)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_killed_processes_are_deleted_after_an_hour(tmp_path: Path) -> None:
    names = ["a.00000000.tmp", "a.ffffffff.tmp", "b.00000000.tmp", "a.tmp", "a.00000000.tmp.md"]
    for name in names:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    os.utime(tmp_path / "a.ffffffff.tmp")  # of a process that is writing
    replace_file(tmp_path / "a", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", *names[1:]}


def test_a_file_with_a_long_name_can_be_replaced(tmp_path: Path) -> None:
    replace_file(tmp_path / ("\N{OGHAM SPACE MARK}" * 85), "new")  # 255 bytes
    assert len(list(tmp_path.iterdir())) == 1
