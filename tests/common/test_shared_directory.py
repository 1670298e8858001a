"""Whether machines share a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.common.shared_directory import has_marks, mark, unmark


def test_directories_are_compared_without_leaving_a_trace(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    where = mark([str(shared / "not" / "yet")], "one")
    assert where == [str(shared)]
    assert has_marks(where, ["one", "two"], seconds=0) == [["two"]]
    assert has_marks([str(other)], ["one"], seconds=0) == [["one"]]
    unmark(where, "one")
    assert list(shared.iterdir()) == []


def test_no_file_is_left_if_a_directory_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mark([str(tmp_path / "runs"), "/proc/self/checkpoints"], "one")
    assert list(tmp_path.iterdir()) == []
