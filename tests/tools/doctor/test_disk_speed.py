"""The measurement of a disk's speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.tools.doctor import disk_speed


def test_measuring_the_disk_leaves_no_file(tmp_path: Path) -> None:
    measured = disk_speed.measure(tmp_path, most_bytes=32 << 20, seconds=1.0)
    assert 16 << 20 <= measured.written <= 32 << 20
    assert 0 < measured.sync_seconds <= measured.worst_sync_seconds < 10
    assert list(tmp_path.iterdir()) == []


def test_write_speed_is_reported_as_the_time_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "measure", lambda _: disk_speed.Speed(200_000_000, 2.0, 0.001, 0.002))  # 100 MB/s
    write, sync = disk_speed.speed(tmp_path, 1_000_000_000, 0.0, between_saves=60.0)
    assert write.found == "200.0 MB at 100 MB/s; a checkpoint takes 10.0 s, one is due every 60.0 s"
    assert (write.status, sync.status) == ("ok", "ok")
    assert disk_speed.speed(tmp_path, 1_000_000_000, 0.0, between_saves=15.0)[0].status == "warn"
    limited = disk_speed.speed(tmp_path, 1_000_000_000, 2_000_000.0, between_saves=None)[0]
    assert (limited.status, "takes 500.0 s at 2 MB/s" in limited.found) == ("warn", True)
