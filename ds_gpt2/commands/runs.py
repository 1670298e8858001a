"""Runs by what a person calls them."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import CONFIG, absolute_run_dir, last_started, run_of
from ds_gpt2.config.settings import PROJECT_DIR


def started_runs() -> list[Path]:
    """The directories of all runs, the one started last at the end."""
    return sorted((config.parent for config in (PROJECT_DIR / "runs").glob(f"*/{CONFIG}")), key=last_started)


def find_run(name: str | None) -> Path:
    """The directory of a run by name, by path, by the path of its checkpoints, or of the one started last.

    Raises:
        UserError: there is no such run.
    """
    runs, started = PROJECT_DIR / "runs", started_runs()
    if name is None:
        if not started:
            raise UserError(f"no runs in {runs} yet: start one with `./launch.sh quickstart`")
        return started[-1]
    with contextlib.suppress(OSError):  # a name that is too long
        for path in (runs / name, Path(name)):
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                raise UserError(f"{path} cannot be read: {os.strerror(errno.EACCES)}")
            if (path / CONFIG).is_file():
                return absolute_run_dir(path)
            if os.path.lexists(path / CONFIG):
                raise UserError(f"{path / CONFIG} is not a regular file: restore it from a copy of the run")
        if (run_dir := run_of(Path(name))) is not None:
            return run_dir
    known = ", ".join(run_dir.name for run_dir in started) or "none"
    raise UserError(f"no run {name}: known in {runs} are {known}")
