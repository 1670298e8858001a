"""Checks of the kind of file system and of the operations that commits need."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.tools.doctor import file_system


@pytest.mark.parametrize(
    ("mount", "status", "word"),
    [
        ("/dev/sda1 POINT ext4 rw,relatime 0 0", "ok", "ext4 on"),
        ("/dev/sda1 POINT ext4 ro,relatime 0 0", "fail", "read-only"),
        ("nas:/home POINT nfs4 rw,vers=4.2 0 0", "warn", "network"),
        ("me@far:/ POINT fuse.sshfs rw 0 0", "warn", "network"),
        ("bucket POINT fuse.s3fs rw 0 0", "fail", "object store"),
        ("tmpfs POINT tmpfs rw 0 0", "warn", "in memory"),
        ("overlay POINT overlay rw 0 0", "warn", "container"),
    ],
)
def test_kind_of_file_system(tmp_path: Path, mount: str, status: str, word: str) -> None:
    point = tmp_path / "my disk"
    point.mkdir()
    mounts = tmp_path / "mounts"
    escaped = str(point).replace(" ", "\\040")
    mounts.write_text(f"/dev/root / xfs rw 0 0\n{mount.replace('POINT', escaped)}\n")
    row = file_system.kind_of_file_system(point / "checkpoints" / "run", mounts)
    assert (row.status, word in row.found) == (status, True)
    assert file_system.kind_of_file_system(tmp_path, mounts).found == "xfs on /, local"


def test_a_file_system_in_memory_is_a_warning() -> None:
    assert file_system.kind_of_file_system(Path("/dev/shm")).status == "warn"


def test_operations_of_a_commit_are_possible(tmp_path: Path) -> None:
    assert [row.status for row in file_system.operations(tmp_path / "run")] == ["ok"]
    assert list(tmp_path.iterdir()) == []
