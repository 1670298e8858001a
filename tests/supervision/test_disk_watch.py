"""Warnings of disks that get full or cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import load_settings
from ds_gpt2.supervision.disk_watch import DiskWatch, WriteWatch

HOUR = 3600.0


class Disk:
    def __init__(self, config: Path, free_gb: float) -> None:
        self.free, self.now = free_gb * 1e9, 0.0
        self.watch = DiskWatch(load_settings(config), clock=lambda: self.now, free_bytes=lambda: int(self.free))

    def pass_time(self, hours: float, gb_an_hour: float = 0.0) -> list[str]:
        warnings = []
        for _ in range(round(6 * hours)):
            if (warning := self.watch.check()) is not None:
                warnings.append(warning)
            self.now += HOUR / 6
            self.free -= gb_an_hour * 1e9 / 6
        return warnings


def test_a_disk_with_enough_space_is_not_reported(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    disk = Disk(write_config(tmp_path), free_gb=1000)
    assert disk.pass_time(100, gb_an_hour=1) == []


def test_a_disk_that_gets_full_is_reported_once_and_days_ahead(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    disk = Disk(write_config(tmp_path), free_gb=200)
    (warning,) = disk.pass_time(140, gb_an_hour=1)  # 60 hours are left at the end, the limit is 72
    assert "enough for 2.9 days" in warning or "enough for 3.0 days" in warning
    disk.free = 500e9
    assert disk.pass_time(100) == []


def test_a_disk_without_space_for_the_next_checkpoint_is_reported_immediately(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    disk = Disk(write_config(tmp_path), free_gb=0.9)
    (warning,) = disk.pass_time(1)
    assert "next checkpoint" in warning and "free some space" in warning


def test_a_trend_of_two_hours_is_not_reported(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    disk = Disk(write_config(tmp_path), free_gb=100)
    assert disk.pass_time(2, gb_an_hour=5) == []


def test_a_run_directory_that_cannot_be_written_is_reported_once_after_minutes(tmp_path: Path) -> None:
    now = [0.0]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    watch = WriteWatch(OpenDirectory(run_dir), clock=lambda: now[0])

    def pass_time(minutes: int) -> list[str]:
        reported = []
        for _ in range(6 * minutes):
            reported += [text] if (text := watch.check()) is not None else []
            now[0] += 10
        return reported

    assert pass_time(10) == [] and list(run_dir.iterdir()) == []
    (run_dir / ".write_probe").mkdir()  # stands for a full disk
    assert pass_time(1) == []
    assert pass_time(10) == [f"{run_dir} has not been writable for 2m (Is a directory): the run trains without logs"]
    (run_dir / ".write_probe").rmdir()
    assert pass_time(1) == []
    (run_dir / ".write_probe").mkdir()
    assert len(pass_time(10)) == 1
