"""Compare the files in a directory before and after an action."""

from __future__ import annotations

from pathlib import Path


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (size, modification time in ns) of every file in ``folder``; (0, 0) for directories."""
    return {
        str(path.relative_to(folder)): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }
