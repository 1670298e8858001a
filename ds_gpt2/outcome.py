"""How a run ended, as an exit code and as a file: DeepSpeed's launcher exits 1 even when every rank has saved."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

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


def end_process(code: int) -> NoReturn:
    """End a rank that has finished everything, without Python's own tear-down.

    In the tear-down a thread of a C++ library that still wants the interpreter aborts the process ("terminate called
    without an active exception"): seen now and then as a failed rank after a run that was saved and done.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or a broken pipe
            stream.flush()
    os._exit(code)
