"""Count the processes that the kernel has killed because memory ran out."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ds_gpt2.common.cgroup import groups


def out_of_memory_kills() -> int:
    """Return the number of processes killed for lack of memory so far.

    This process's control group is asked first, then each group above it, then the machine: the first that has a
    counter decides. Without any counter the number is 0.
    """
    for file in (*_memory_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")), Path("/proc/vmstat")):
        if (kills := _kills_in(file)) is not None:
            return kills
    return 0


def _kills_in(file: Path) -> int | None:
    """Return the value of ``oom_kill`` in ``file``; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return None


def _memory_groups(mounted: Path, own: Path) -> list[Path]:
    """Return the files in which control groups of both versions count kills, those of this process's group first.

    See cgroups(7) and the kernel's documentation.
    """
    with contextlib.suppress(OSError, ValueError):
        found = groups(mounted, own.read_text(encoding="utf-8"))
        return [group / name for group in found for name in ("memory.events", "memory.oom_control")]
    return []
