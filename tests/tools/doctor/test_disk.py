"""Checks of permissions, free space, inodes and quota on a real disk."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_files import write_checkpoint
from doctor_helpers import changed, unprivileged

from ds_gpt2.checkpoint.naming import BEST_TAG, rolling_tag
from ds_gpt2.config.settings import Settings
from ds_gpt2.tools.doctor import disk
from ds_gpt2.tools.doctor.checks import checks
from ds_gpt2.tools.doctor.finding import run_check
from ds_gpt2.tools.resources import requirements


def test_free_space_is_compared_with_the_requirement(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    gigabyte = 10**9
    assert disk.free_space(tmp_path, requirements.DiskRequirement(gigabyte, 3, gigabyte, gigabyte)).status == "ok"
    early = disk.free_space(tmp_path, requirements.DiskRequirement(gigabyte, 9, free + 2 * gigabyte, gigabyte))
    assert (early.status, "set checkpoint.keep_last=" in early.fix) == ("warn", True)
    assert int(early.fix.split("keep_last=")[1]) in (5, 6, 7)  # other processes also write to this disk
    full = disk.free_space(
        tmp_path / "not" / "yet", requirements.DiskRequirement(gigabyte, 9, free + gigabyte, free + gigabyte)
    )
    assert full.status == "fail"
    assert "free some space" in full.fix


def test_the_space_that_must_remain_free_is_not_counted_as_checkpoints(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with_reserve = changed(settings, checkpoint={"min_free_gb": 100_000.0})
    (check,) = [check for check in checks(with_reserve, "cpu", 1) if check.name == "free space"]
    (row,) = run_check(check)
    assert row.status == "fail" and row.fix.startswith("at least 100.00 TB are needed in total")
    assert row.found.endswith(", and 100.00 TB must remain free (checkpoint.min_free_gb)")
    (retained,) = re.findall("all retained checkpoints ([^,]*),", row.found)
    assert not retained.endswith("TB")


def test_checkpoints_of_the_run_count_as_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = write_checkpoint(tmp_path, rolling_tag(2), 2, {"file": bytes(3_000_000)})
    best = write_checkpoint(tmp_path, BEST_TAG, 2, {"file": b""})  # shares the file of the newest one
    (best / "file").unlink()
    os.link(newest / "file", best / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    row = disk.free_space(tmp_path, requirements.DiskRequirement(1_000_000, 3, 4_000_000, 4_000_000))
    assert (row.status, "1.0 MB free, 3.0 MB used by this run already" in row.found) == ("ok", True)
    assert disk.free_space(tmp_path, requirements.DiskRequirement(1_000_000, 3, 4_010_000, 4_010_000)).status == "fail"


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        shut = Path(name)
        shut.chmod(0o555)
        with unprivileged():
            rows = disk.directories([shut / "run", shut / "run", shut / "other"])
        assert [(row.name, row.status) for row in rows] == [("directory run", "fail"), ("directory other", "fail")]
        assert rows[0].found == f"{shut}: Permission denied"
    (tmp_path / "a file").touch()
    assert [row.status for row in disk.directories([tmp_path / "a file"])] == ["fail"]
    assert [row.status for row in disk.directories([tmp_path / "new" / "run"])] == ["ok"]
    impossible = [tmp_path / ("x" * 300), tmp_path / "a file" / "x", tmp_path / ("x" * 300) / "y"]
    assert [row.status for row in disk.directories(impossible)] == ["fail"] * 3
    assert not (tmp_path / "new").exists()


def test_missing_permissions_are_reported(settings: Settings, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        shut = Path(name)
        shut.chmod(0)
        directories = {
            "run": {"dir": shut / "runs"},
            "checkpoint": {"dir": shut / "ckpt"},
            "data": {"dir": shut / "data"},
        }
        hidden = changed(settings, **directories)
        with unprivileged():  # few checks: Python may import modules that this user cannot read
            listed = [
                check for check in checks(hidden, "cpu", 2) if check.name in ("directories", "free space", "data")
            ]
            rows = [row for check in listed for row in run_check(check)]
    assert {row.name: row.status for row in rows} == {
        "directory test": "fail",
        "directory tensorboard": "fail",
        "free space": "ok",
        "data": "fail",
    }
    assert "Permission denied" in rows[0].found and "Permission denied" in rows[-1].found


def test_quota_and_inodes_of_this_disk(tmp_path: Path) -> None:
    assert disk.quota(tmp_path, requirements.DiskRequirement(1, 1, 1, 1)).status == "ok"
    assert disk.inodes(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []
