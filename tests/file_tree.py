"""The files below a directory, to check that nothing changed."""

from __future__ import annotations

from pathlib import Path


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (size, modification time in ns) of every file below ``folder`` by relative path; (0, 0) of directories."""
    return {
        str(path.relative_to(folder)): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }
