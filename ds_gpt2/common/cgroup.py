"""The control groups (version 1 or 2) of this process, and their limits: memory, cores, tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60  # bytes; without a limit, cgroup v1 reports about 2**63


@dataclass(frozen=True)
class Cgroup:
    """Limits of this process; None if there is no limit."""

    memory: int | None  # bytes that can still be allocated
    cores: float | None
    tasks: int | None  # processes and threads that can still be started


def read_cgroup(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> Cgroup:
    """Return the lowest limits of all groups that contain this process.

    Args:
        membership: content of /proc/self/cgroup; default: read the file.
    """
    if membership is None:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    memory: list[int] = []
    quotas: list[float] = []
    tasks: list[int] = []
    for folder in groups(root, membership):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            maximum, used = _number(folder / limit), _number(folder / usage)
            if maximum is not None and used is not None and maximum < _NO_LIMIT:
                memory.append(max(0, maximum - used + _cache(folder)))
        quotas += _quota(folder)
        maximum, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if maximum is not None and used is not None:
            tasks.append(max(0, maximum - used))
    return Cgroup(min(memory, default=None), min(quotas, default=None), min(tasks, default=None))


def groups(root: Path, membership: str) -> Iterator[Path]:
    """Yield the directories of this process's groups and of all groups above them; in a container, the visible ones.

    Args:
        root: where the groups are mounted.
        membership: content of /proc/self/cgroup.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        trees = (
            [root / controllers, *(root / name for name in controllers.split(","))]
            if controllers
            else [root, root / "unified"]
        )
        for tree in dict.fromkeys(trees):
            group = tree / path.lstrip("/")
            while group != tree and tree in group.parents:
                yield group
                group = group.parent
            yield tree


def _cache(folder: Path) -> int:
    """Return the bytes of the page cache: counted as used, but reclaimed on demand."""
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in ("active_file", "inactive_file"))


def _quota(folder: Path) -> list[float]:
    """Return the CPU limit of a group in cores, as a list of one number; an empty list without a limit."""
    words = _text(folder / "cpu.max").split()
    quota, period = (words[0], words[1]) if len(words) == 2 else ("", "")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() else []


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
