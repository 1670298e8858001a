"""Count the processes that the kernel has killed because memory ran out."""

from __future__ import annotations

import contextlib
from pathlib import Path


def out_of_memory_kills() -> int:
    """Return the number of processes killed for lack of memory so far.

    The count is that of this process's control group, or of the machine if the group has no counter; 0 if neither has.
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
    """Return the files in which control groups of both versions count kills.

    See cgroups(7) and the kernel's documentation. A process in a cgroup namespace of its own finds its group at the
    mounted root; any other process finds it below the root.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found += [mounted / path.lstrip("/") / "memory.events", mounted / "memory.events"]
            elif "memory" in controllers.split(","):
                found += [mounted / "memory" / path.lstrip("/") / "memory.oom_control"]
                found += [mounted / "memory" / "memory.oom_control"]
    return found
