"""Find runs and settings files by the names that users type."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import CONFIG, RESTORE, absolute_run_dir, last_started, run_of
from ds_gpt2.config.settings import CHECKPOINTS, PROJECT_DIR, RUNS
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.starts import STARTS

_RECORDS = (JOURNAL, STARTS, METRICS)


def started_runs() -> list[Path]:
    """Return the directories of all runs in ``runs/``, ordered by the time of their last start.

    Runs whose settings are lost are included.
    """
    return sorted((path for path in (PROJECT_DIR / RUNS).glob("*") if is_run(path)), key=last_started)


def is_run(directory: Path) -> bool:
    """Return whether a directory has settings or records of a run."""
    return os.path.lexists(directory / CONFIG) or _has_records(directory)


def _has_records(directory: Path) -> bool:
    return any(os.path.isfile(directory / name) for name in _RECORDS)


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
        return _newest_run(started)
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
            if _has_records(path):
                raise UserError(f"{path / CONFIG} is missing: {RESTORE}{_hint_at_checkpoints(path.name)}")
    known = ", ".join(run_dir.name for run_dir in started) or "none"
    raise UserError(f"no run {name}; runs in {runs}: {known}")


def _newest_run(started: Sequence[Path]) -> Path:
    """Return the last of ``started``.

    Raises:
        UserError: it has no settings: another run must not be chosen in its place.
    """
    *others, newest = started
    if (newest / CONFIG).is_file():
        return absolute_run_dir(newest)
    problem = "is not a regular file" if os.path.lexists(newest / CONFIG) else "is missing"
    usable = [run_dir.name for run_dir in others if (run_dir / CONFIG).is_file()]
    other = f", or name another run ({', '.join(usable)})" if usable else ""
    raise UserError(f"{newest / CONFIG} of the newest run {problem}: {RESTORE}{other}")


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
