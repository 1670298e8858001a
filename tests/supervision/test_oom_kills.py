"""The count of processes that the kernel has killed for lack of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.supervision import oom_kills


@pytest.mark.parametrize(
    ("own", "file", "content", "kills"),
    [
        ("0::/user/run", "user/run/memory.events", "low 0\noom 4\noom_kill 3\n", 3),
        ("0::/", "memory.events", "oom_kill 2\n", 2),
        ("5:cpu:/x\n4:memory:/docker/1\n0::/", "memory/docker/1/memory.oom_control", "under_oom 0\noom_kill 7\n", 7),
        ("4:cpu,memory:/docker/1", "memory/memory.oom_control", "oom_kill 5\n", 5),
    ],
)
def test_kills_are_read_from_both_versions_of_control_groups(
    tmp_path: Path, own: str, file: str, content: str, kills: int
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    (tmp_path / "cgroup" / file).parent.mkdir(parents=True)
    (tmp_path / "cgroup" / file).write_text(content)
    groups = oom_kills._memory_groups(tmp_path / "cgroup", tmp_path / "own")
    found = next(group for group in groups if group.exists())
    assert oom_kills._kills_in(found) == kills


def test_the_machine_counts_kills_if_no_control_group_does() -> None:
    assert oom_kills.out_of_memory_kills() >= 0
    assert oom_kills._kills_in(Path("/proc/vmstat")) is not None
