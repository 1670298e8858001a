"""The names of files and directories in ``checkpoints/<run>/``. Nothing here accesses the disk."""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["rolling", "epoch", "best", "superseded"]

MANIFEST = "manifest.json"  # the commit marker: a directory that contains it is a checkpoint
LATEST = "latest"  # a file with the tag of the newest checkpoint
LATEST_BACKUP = "latest_backup"  # a file with the tag of the checkpoint before it; not one of ``checkpoint.backup``
BEST_TAG = "best_model"
LOCK = "lock"  # held by the process that trains the run
PARTIAL = ".tmp"  # suffix of a checkpoint that is being written, or that a crash has left incomplete

COPYING = "backup_in_progress.tmp"  # hard links to checkpoints that are being backed up: retention may delete those

_PATTERNS: dict[Role, str] = {
    "rolling": r"rolling_step_\d{6,}",
    "epoch": r"epoch_\d{5,}",
    "best": BEST_TAG,
    "superseded": r"superseded_step_\d{6,}",
}


def rolling_tag(step: int) -> str:
    """Return the tag of the regular checkpoint of ``step``."""
    return f"rolling_step_{step:06d}"


def epoch_tag(epoch: int) -> str:
    """Return the tag of the checkpoint at the end of ``epoch``, counted from 1."""
    return f"epoch_{epoch:05d}"


def superseded_tag(step: int) -> str:
    """Return the tag of a checkpoint that is no longer part of the run: the run has resumed from an earlier step."""
    return f"superseded_step_{step:06d}"


def role_of(tag: str) -> Role | None:
    """Return the role of a checkpoint with this name; None if the name is not a tag of this project."""
    return next((role for role, pattern in _PATTERNS.items() if re.fullmatch(pattern, tag, re.ASCII)), None)


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` is a file name without a path, safe to append to a directory."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
