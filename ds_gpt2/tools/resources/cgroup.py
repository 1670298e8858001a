"""Limits of the control groups above this process, of version 1 or 2: memory, cores, tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60  # bytes; cgroup v1 writes a number about 2**63 for none


@dataclass(frozen=True)
class Cgroup:
    """What the control groups above this process allow; None where nothing limits it."""

    memory: int | None  # bytes that may still be taken
    cores: float | None
    tasks: int | None  # processes and threads that may still be started


def read_cgroup(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> Cgroup:
    """The tightest limits among the groups that hold this process, of version 1 or 2.

    Args:
        membership: the text of /proc/self/cgroup.
    """
    if membership is None:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    memory: list[int] = []
    quotas: list[float] = []
    more: list[int] = []
    for folder in _groups(root, membership):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < _NO_LIMIT:
                memory.append(max(0, most - used + _cache(folder)))
        quotas += _quota(folder)
        most, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None and used is not None:
            more.append(max(0, most - used))
    return Cgroup(min(memory, default=None), min(quotas, default=None), min(more, default=None))


def _groups(root: Path, membership: str) -> Iterator[Path]:
    """Directories of this process's groups and of all above them; in a container, of those it can see."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        trees = (
            [root / controllers, *(root / name for name in controllers.split(","))]
            if controllers
            else [root, root / "unified"]
        )
        for tree in dict.fromkeys(trees):
            place = tree / path.lstrip("/")
            while place != tree and tree in place.parents:
                yield place
                place = place.parent
            yield tree


def _cache(folder: Path) -> int:
    """Bytes counted as used that hold files and are given up when memory is wanted."""
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in ("active_file", "inactive_file"))


def _quota(folder: Path) -> list[float]:
    """Cores that CPU time is granted for, if that is limited here."""
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
