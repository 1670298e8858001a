"""Directories that are moved, deleted and replaced while they are open."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ds_gpt2.common.open_directory import OpenDirectory


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "project" / "runs" / "a"
    path.mkdir(parents=True)
    return path


def test_an_unmoved_directory_has_its_original_path(run_dir: Path) -> None:
    directory = OpenDirectory(run_dir)
    assert directory.path == run_dir and not directory.is_moved and not directory.is_deleted


@pytest.mark.parametrize("moved", ["project", "project/runs", "project/runs/a"])
def test_a_move_of_the_directory_or_of_a_parent_is_followed(tmp_path: Path, run_dir: Path, moved: str) -> None:
    directory = OpenDirectory(run_dir)
    (tmp_path / moved).rename(tmp_path / "elsewhere")
    inside = run_dir.relative_to(tmp_path / moved)
    assert directory.path == tmp_path / "elsewhere" / inside
    assert directory.is_moved and not directory.is_deleted
    (tmp_path / "elsewhere").rename(tmp_path / moved)
    assert directory.path == run_dir and not directory.is_moved and not directory.is_deleted


def test_a_new_directory_at_the_old_path_is_another_one(tmp_path: Path, run_dir: Path) -> None:
    directory = OpenDirectory(run_dir)
    run_dir.parents[1].rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "project")
    assert directory.path == tmp_path / "before" / "runs" / "a" and directory.is_moved


def test_a_directory_behind_a_link_has_the_path_of_the_link(tmp_path: Path, run_dir: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    directory = OpenDirectory(link)
    assert directory.path == link and not directory.is_moved and not directory.is_deleted
    run_dir.rename(tmp_path / "elsewhere")
    assert directory.path == tmp_path / "elsewhere"
    (tmp_path / "elsewhere").rmdir()
    assert directory.is_deleted and directory.path == link


def test_a_deleted_directory_is_recreated(run_dir: Path) -> None:
    directory = OpenDirectory(run_dir)
    shutil.rmtree(run_dir.parents[1])
    assert directory.is_deleted and not directory.is_moved and directory.path == run_dir
    directory.recreate()
    assert run_dir.is_dir() and not directory.is_moved and not directory.is_deleted


def test_a_deleted_directory_is_not_recreated_on_another_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example below the mount point of an unmounted disk."""
    directory = OpenDirectory(run_dir)
    shutil.rmtree(run_dir.parents[1])
    stat = run_dir.parents[2].stat()
    monkeypatch.setattr(
        Path, "stat", lambda path, **_: type("Stat", (), {"st_dev": stat.st_dev + 1, "st_mode": 0o40755})()
    )
    with pytest.raises(FileNotFoundError, match="its path is on another file system"):
        directory.recreate()
    monkeypatch.undo()
    assert not run_dir.exists()


def test_a_directory_created_later_is_opened(tmp_path: Path) -> None:
    directory = OpenDirectory(tmp_path / "later")
    assert not directory.is_moved and not directory.is_deleted
    (tmp_path / "later").mkdir()
    assert not directory.is_moved and not directory.is_deleted
    (tmp_path / "later").rename(tmp_path / "moved")
    assert directory.path == tmp_path / "moved"


def test_a_changed_link_is_not_a_move(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "other").mkdir()
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    directory = OpenDirectory(link)
    link.unlink()
    link.symlink_to(tmp_path / "other")
    assert directory.path == link and not directory.is_moved and not directory.is_deleted


def test_a_directory_recreated_by_another_process_is_used(run_dir: Path) -> None:
    directory = OpenDirectory(run_dir)
    run_dir.rmdir()
    run_dir.mkdir()
    assert directory.path == run_dir and not directory.is_moved and not directory.is_deleted


def test_another_directory_at_the_path_is_detected_unless_it_is_a_copy(tmp_path: Path) -> None:
    """For example when a disk is unmounted; simulated with a link."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    link = tmp_path / "link"
    link.symlink_to("one")
    opened = OpenDirectory(link)
    assert not opened.is_replaced("marker")
    link.unlink()
    assert not opened.is_replaced("marker")
    link.symlink_to("other")
    (tmp_path / "other" / "file").touch()
    assert opened.is_replaced("marker")
    (tmp_path / "other" / "marker").touch()
    assert not opened.is_replaced("another", "marker")


def test_a_deleted_and_recreated_directory_does_not_count_as_replaced(run_dir: Path) -> None:
    opened = OpenDirectory(run_dir)
    run_dir.rmdir()
    run_dir.mkdir()
    assert not opened.is_replaced("marker")


def test_an_unavailable_directory_is_neither_deleted_nor_replaced(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = OpenDirectory(run_dir)
    run_dir.rmdir()

    def stale(path: Path, **options: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "stat", stale)
    assert not directory.is_deleted and not directory.is_replaced()
