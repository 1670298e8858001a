"""Which files a process has open."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from ds_gpt2.common.open_files import has_original_open

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the function uses /proc")


def test_a_copy_of_an_open_file_is_recognized_but_not_a_moved_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "supervisor").mkdir(parents=True)
    with (tmp_path / "a" / "supervisor" / "lock").open("wb"):
        assert not has_original_open(os.getpid(), tmp_path / "a" / "supervisor" / "lock")
        shutil.copytree(tmp_path / "a", tmp_path / "copy")
        (tmp_path / "a").rename(tmp_path / "moved")
        assert not has_original_open(os.getpid(), tmp_path / "moved" / "supervisor" / "lock")
        assert has_original_open(os.getpid(), tmp_path / "copy" / "supervisor" / "lock")
    assert not has_original_open(os.getpid(), tmp_path / "copy" / "supervisor" / "lock")


def test_files_of_another_name_and_unknown_processes_are_no_evidence(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with (tmp_path / "a" / "lock").open("rb"):
        assert not has_original_open(os.getpid(), tmp_path / "b" / "lock")
        assert not has_original_open(os.getpid(), tmp_path / "a" / "missing")
    assert not has_original_open(2**31 - 1, tmp_path / "a" / "lock")
