"""Which files a process has open, on Linux."""

from __future__ import annotations

import os
from pathlib import Path


def has_original_open(pid: int, path: Path) -> bool:
    """Return whether ``path`` is a copy of a file that process ``pid`` has open.

    The process has open a file with the same name, in a directory with the same name, but not ``path`` itself. False if
    this cannot be determined: the process belongs to another user, or the system is not Linux.
    """
    descriptors = Path(f"/proc/{pid}/fd")
    try:
        copy = path.stat()
        opened = [descriptors / number for number in os.listdir(descriptors)]
    except OSError:
        return False
    similar = [found for descriptor in opened if (found := _stat_if_named(descriptor, path.parts[-2:])) is not None]
    return bool(similar) and not any(os.path.samestat(found, copy) for found in similar)


def _stat_if_named(descriptor: Path, names: tuple[str, ...]) -> os.stat_result | None:
    """Return the status of an open file whose path ends with ``names``; None for another file, or a deleted one."""
    try:
        if Path(os.readlink(descriptor)).parts[-len(names) :] != names:  # not accessed: its server may be down
            return None
        return descriptor.stat()
    except OSError:  # closed meanwhile
        return None
