"""Disk usage of directories."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def bytes_below(directory: Path) -> int:
    """Return the bytes of all files below ``directory``; hard links to the same file count once."""
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                status = os.lstat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
