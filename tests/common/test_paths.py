"""Paths of the user are absolute and without ``..``, and denote the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.common.paths import absolute


def test_the_parent_of_a_directory_is_removed_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert absolute("../b") == tmp_path / "b"
    assert absolute("a/../missing/../b", tmp_path) == tmp_path / "b"
    assert absolute("/b/../..") == Path("/")


def test_the_parent_of_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    target = tmp_path / "disk" / "target"
    target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    assert absolute(tmp_path / "link" / "..") == tmp_path / "disk"
    assert absolute("link/../b", tmp_path) == tmp_path / "disk" / "b"


def test_links_that_no_parent_follows_are_kept(tmp_path: Path) -> None:
    (tmp_path / "target" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target" / "other").symlink_to("inside")
    assert absolute(tmp_path / "link" / "inside") == tmp_path / "link" / "inside"
    assert absolute(tmp_path / "link" / "inside" / ".." / "other") == tmp_path / "link" / "other"


def test_an_absolute_path_needs_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert absolute(tmp_path / "a" / ".." / "b") == tmp_path / "b"
