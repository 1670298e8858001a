"""The layout of ``checkpoints/<run>/``: tags, manifests, the ``latest`` pointer. Knows the disk, not DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ds_gpt2.errors import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".tmp"


def rolling_tag(step: int) -> str:
    return f"rolling_step_{step:06d}"


def committed_tags(directory: Path) -> list[str]:
    """Tags of committed rolling checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if (path / MANIFEST).exists())
    steps = (re.fullmatch(r"rolling_step_(\d{6,})", name) for name in names)
    return [rolling_tag(step) for step in sorted(int(match[1]) for match in steps if match)]


def read_latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None if there is no pointer.

    Raises:
        UserError: the pointer cannot be read.
    """
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{directory / LATEST} cannot be read ({error}): write the tag of a checkpoint into it"
        ) from None


def read_manifest(directory: Path, tag: str) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = directory / tag / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        found = ", ".join(committed_tags(directory)[-3:]) or "none"
        raise UserError(f"no checkpoint {tag!r} in {directory} (newest there: {found})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def commit(directory: Path, tag: str, manifest: dict[str, Any]) -> None:
    """Turn ``<tag>.tmp`` into ``<tag>``: manifest, rename, then ``latest``; an older ``<tag>`` is replaced."""
    partial, final = directory / (tag + PARTIAL), directory / tag
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if final.exists():
        remove(directory, tag)
    partial.rename(final)
    pointer = directory / (LATEST + PARTIAL)
    pointer.write_text(tag, encoding="utf-8")
    os.replace(pointer, directory / LATEST)


def remove(directory: Path, tag: str) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one is no checkpoint."""
    (directory / tag / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory / tag)


def check_writable(directory: Path) -> None:
    """
    Raises:
        UserError: files cannot be made in ``directory`` (which is created).
    """
    probe = directory / f".probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; check its permissions") from None
