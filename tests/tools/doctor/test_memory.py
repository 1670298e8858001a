"""Checks of memory, cores and the limits of containers."""

from __future__ import annotations

from pathlib import Path

from ds_gpt2.common.cgroup import Cgroup, read_cgroup
from ds_gpt2.tools.doctor import memory


def test_limits_of_a_cgroup_v2_container(tmp_path: Path) -> None:
    """The tightest limit of the parent groups counts, and the page cache does not count as used."""
    inner = tmp_path / "system.slice" / "docker-1.scope"
    inner.mkdir(parents=True)
    (tmp_path / "system.slice" / "memory.max").write_text("8000000000\n")
    (tmp_path / "system.slice" / "memory.current").write_text("6000000000\n")
    (tmp_path / "system.slice" / "memory.stat").write_text("anon 1\nactive_file 500000000\ninactive_file 1500000000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("6000000000\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (inner / "pids.max").write_text("100\n")
    (inner / "pids.current").write_text("40\n")
    found = read_cgroup(tmp_path, "0::/system.slice/docker-1.scope\n")
    assert found == Cgroup(memory=4_000_000_000, cores=1.5, tasks=60)
    assert memory.host(3_900_000_000, found).status == "warn"
    assert memory.host(4_100_000_000, found).status == "fail"
    assert memory.tasks(4, found).status == "fail"
    few = Cgroup(None, 0.5, None)
    assert (
        memory.cores("cpu", 4, few).status,
        "limited by the cgroup to 0.5" in memory.cores("cpu", 4, few).found,
    ) == ("warn", True)


def test_limits_of_a_cgroup_v1_container(tmp_path: Path) -> None:
    """Inside a container the path of the group does not exist."""
    for folder in ("memory", "cpu,cpuacct"):
        (tmp_path / folder).mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("2000000000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("500000000\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_period_us").write_text("100000\n")
    found = read_cgroup(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    assert found == Cgroup(memory=1_500_000_000, cores=None, tasks=None)
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_cgroup(tmp_path, "4:memory:/docker/abc\n").memory is None


def test_shared_memory(tmp_path: Path) -> None:
    assert memory.shared_memory("cuda", tmp_path / "missing").status == "fail"
    assert memory.shared_memory("cpu").status == "ok"
    assert "--shm-size" in memory.shared_memory("cuda", Path("/proc")).fix  # a file system of size 0


def test_swap_and_overcommit(tmp_path: Path) -> None:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/vm/overcommit_memory").write_text("0\n")
    (tmp_path / "self/oom_score_adj").write_text("200\n")
    assert "oom_score_adj 200" in memory.swap(tmp_path).found
    (tmp_path / "sys/vm/overcommit_memory").write_text("2\n")
    assert "vm.overcommit_memory=0" in memory.swap(tmp_path).fix
    assert memory.swap().status in ("ok", "warn")
