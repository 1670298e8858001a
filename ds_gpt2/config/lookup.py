"""Find runs and settings files by the names that users type."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shlex
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import CONFIG, RESTORE, absolute_run_dir, last_started, run_of
from ds_gpt2.config.settings import CHECKPOINTS, PROJECT_DIR, RUNS
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.starts import STARTS


def started_runs() -> list[Path]:
    """Return the directories of all runs in ``runs/``, ordered by the time of their last start."""
    return sorted((config.parent for config in (PROJECT_DIR / RUNS).glob(f"*/{CONFIG}")), key=last_started)


def find_run(name: str | None) -> Path:
    """Return the directory of a run.

    Args:
        name: the name of a run in ``runs/``, the path of a run, or the path of its checkpoints; None: the run that was
            started last.

    Raises:
        UserError: there is no such run.
    """
    runs, started = PROJECT_DIR / RUNS, started_runs()
    if name is None:
        if not started:
            raise UserError(f"no runs in {runs} yet: start one with `./launch.sh quickstart`")
        return absolute_run_dir(started[-1])
    with contextlib.suppress(OSError):  # a name that is too long
        for path in (runs / name, Path(name)):
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                raise UserError(f"{path} cannot be read: {os.strerror(errno.EACCES)}")
            if (path / CONFIG).is_file():
                return absolute_run_dir(path)
            if os.path.lexists(path / CONFIG):
                raise UserError(f"{path / CONFIG} is not a regular file: {RESTORE}")
        if (run_dir := run_of(Path(name))) is not None:
            return absolute_run_dir(run_dir)
        for path in (runs / name, Path(name)):
            if any((path / file).is_file() for file in (JOURNAL, STARTS, METRICS)):
                raise UserError(f"{path / CONFIG} is missing: {RESTORE}{_hint_at_checkpoints(path.name)}")
    known = ", ".join(run_dir.name for run_dir in started) or "none"
    raise UserError(f"no run {name}; runs in {runs}: {known}")


def _hint_at_checkpoints(name: str) -> str:
    """Return what works on the checkpoints of a run without settings; empty if it has none in the usual directory."""
    if not (PROJECT_DIR / CHECKPOINTS / name).is_dir():
        return ""
    command = f"./launch.sh list {shlex.quote(name)}"
    return f"; `{command}` and `verify` work on its checkpoints also without it"


def find_config(name: str) -> Path:
    """Return the path of a settings file.

    Args:
        name: a path, or the name of a file in ``ds_configs/`` with or without ``.yaml``.

    Raises:
        UserError: there is no such file.
    """
    shipped = PROJECT_DIR / "ds_configs"
    for path in (Path(name), PROJECT_DIR / name, shipped / name, shipped / f"{name}.yaml"):
        with contextlib.suppress(OSError):  # a name that is too long
            if path.is_file():
                return path
    known = [path.stem for path in sorted(shipped.glob("*.yaml"))]
    problem = f"{name} is not a settings file" if os.path.exists(name) else f"config not found: {name}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"{problem}{hint}; give the path of a YAML file, or one of {', '.join(known)}")
