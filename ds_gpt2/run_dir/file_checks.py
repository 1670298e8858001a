"""Check the files in a run's directory, and explain what is wrong with them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.fork_record import first_step_of
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS, REPLACED
from ds_gpt2.run_dir.starts import STARTS

_APPENDED = (METRICS, REPLACED, JOURNAL, STARTS)
RESTORE_METRICS = "restore it from a copy of the run"
_RESTORE = "move it away, or restore the file from a copy of the run"


def check_files(run_dir: Path) -> None:
    """Check the files to which a start appends.

    Raises:
        UserError: one of them is not a regular file, or cannot be read and written.
    """
    for file in (run_dir / name for name in _APPENDED):
        is_file = os.path.isfile(file)
        if os.path.exists(file) and not is_file:
            raise UserError(f"{file} is not a regular file: {_RESTORE}")
        needed = os.R_OK if file.is_symlink() else os.R_OK | os.W_OK  # a link is replaced, see ``files.no_links``
        if is_file and not os.access(file, needed, effective_ids=True):
            raise UserError(f"{file} cannot be read and written: {os.strerror(errno.EACCES)}; check its permissions")


def read_error(error: OSError, run_dir: Path) -> UserError:
    """Return the error that a file of the run cannot be read, with a fix."""
    is_wrong_kind = error.errno in (errno.EISDIR, errno.EINVAL)  # see ``files.regular_only``
    fix = _RESTORE if is_wrong_kind else "check its permissions and its disk"
    return UserError(f"{error.filename or run_dir} cannot be read: {error.strerror}; {fix}")


def metrics_problem(run_dir: Path, recorded: int, saved: int) -> str | None:
    """Return what is wrong if a saved run has no metrics; None if it has some. ``RESTORE_METRICS`` is the fix.

    A fork has no metrics of its own up to the step of its fork.

    Args:
        recorded: the newest step of the metrics; 0 if there is none.
        saved: the step of the newest checkpoint; 0 or less if there is none.

    Raises:
        UserError: the record of the fork cannot be read.
    """
    if recorded > 0 or saved <= first_step_of(run_dir):
        return None
    file = run_dir / METRICS
    what = "has no readable record" if file.exists() else "is missing"
    return f"{file} {what}: the losses up to step {saved:,} are unknown"
