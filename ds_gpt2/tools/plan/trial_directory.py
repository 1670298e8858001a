"""The temporary directory of a trial, on the disk of the checkpoints."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import DAY
from ds_gpt2.common.process_identity import is_running, start_of
from ds_gpt2.tools.resources.machine import existing

_PREFIX = ".plan-"
_ABANDONED_SECONDS = DAY  # age after which the directory of another machine counts as abandoned


@contextlib.contextmanager
def trial_directory(checkpoints: Path) -> Iterator[Path]:
    """Create an empty directory on the disk of the checkpoints, and remove it at the end.

    Also remove the directories that killed plans have left there.

    Raises:
        UserError: the directory cannot be created.
    """
    parent = existing(checkpoints)
    for leftover in parent.glob(f"{_PREFIX}*"):
        if is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    owner = f"{os.getpid()}-{start_of(os.getpid())}-{host_name()}-"
    try:
        directory = tempfile.mkdtemp(prefix=_PREFIX + owner, dir=parent)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}; set checkpoint.dir, or use --quick") from None
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def is_abandoned(directory: Path) -> bool:
    """Return whether the plan that created this directory no longer runs.

    Other machines may share the disk. Their processes are not visible, so their directories count as abandoned after
    a day.
    """
    pid, start, host, _ = [*directory.name.removeprefix(_PREFIX).split("-", 3), "", "", ""][:4]
    if host == host_name():
        return not (pid.isdigit() and is_running(int(pid), start))
    with contextlib.suppress(OSError):
        return time.time() - directory.stat().st_mtime > _ABANDONED_SECONDS
    return False


def host_name() -> str:
    """Return the name of this machine with only characters that the name of the directory can contain."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
