"""How a run ended, as an exit code and as a file: DeepSpeed's launcher exits 1 even when every rank has saved."""

from __future__ import annotations

import os
from pathlib import Path

DONE, CRASHED, MISTAKE, STOPPED = 0, 1, 2, 3

_VARIABLE = "DS_GPT2_OUTCOME"  # environment: the file in which rank 0 leaves its exit code


def request(file: Path) -> dict[str, str]:
    """The environment that makes a run leave its outcome in ``file``."""
    return {_VARIABLE: str(file)}


def leave(code: int) -> None:
    """Leave ``code`` for whoever asked for it."""
    if _VARIABLE in os.environ:
        Path(os.environ[_VARIABLE]).write_text(str(code), encoding="utf-8")


def read(file: Path) -> int:
    """What the run left; ``CRASHED`` if it left nothing."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return CRASHED
