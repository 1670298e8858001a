"""The names in ``checkpoints/<run>/``: tags and pointers. Nothing here touches the disk."""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["rolling", "epoch", "best", "superseded"]

MANIFEST = "manifest.json"  # a directory is a checkpoint once this is in it
LATEST = "latest"
LATEST_BACKUP = "latest_backup"
BEST_TAG = "best_model"
LOCK = "lock"  # held by the process that trains the run
PARTIAL = ".tmp"  # being written, or left by a crash: never read

COPYING = "backup_in_progress.tmp"  # links to what is being copied elsewhere, which retention may delete meanwhile

_PATTERNS: dict[Role, str] = {
    "rolling": r"rolling_step_\d{6,}",
    "epoch": r"epoch_\d{5,}",
    "best": BEST_TAG,
    "superseded": r"superseded_step_\d{6,}",
}


def rolling_tag(step: int) -> str:
    return f"rolling_step_{step:06d}"


def epoch_tag(epoch: int) -> str:
    return f"epoch_{epoch:05d}"


def superseded_tag(step: int) -> str:
    """The tag of a checkpoint that a resume from an older one has made history."""
    return f"superseded_step_{step:06d}"


def role_of(tag: str) -> Role | None:
    """Why a checkpoint of this name is kept; None if the name is not one of ours."""
    return next((role for role, pattern in _PATTERNS.items() if re.fullmatch(pattern, tag, re.ASCII)), None)


def is_plain_name(name: str) -> bool:
    """Whether ``name`` stays inside the directory it is looked up in."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
