"""``status``: print the status of runs; the exit code shows whether they are healthy, for cron."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import DAY
from ds_gpt2.config.lookup import find_run, started_runs
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.status import news, screen
from ds_gpt2.tools.status.status import Status, read_status

_WATCH_SECONDS, _LONGEST_WATCH_SECONDS = 10.0, DAY
_CLEAR = "\033[H\033[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories of runs (default: the newest run)")
    parser.add_argument("--all", action="store_true", help="print one line for each run")
    parser.add_argument("--json", action="store_true", help="print a JSON object; for several runs, a list")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=_WATCH_SECONDS,
        metavar="SECONDS",
        help=f"refresh every {_WATCH_SECONDS:g} seconds, until Ctrl+C",
    )
    parser.add_argument(
        "--alert", action="store_true", help="send a message when a run becomes unhealthy or healthy again, for cron"
    )


def run(options: argparse.Namespace) -> int:
    """Return exit code 0 if all runs are healthy, else 1."""
    directories = _directories(options)
    if options.watch is None:
        return _show(directories, options)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _show(directories, options, redrawn=sys.stdout.isatty() and not options.json)
            time.sleep(options.watch)
    return exit_codes.DONE


def _directories(options: argparse.Namespace) -> list[Path]:
    if not options.all:
        return [find_run(name) for name in dict.fromkeys(options.runs) or [None]]
    if options.runs:
        raise UserError(f"--all includes every run: remove {' '.join(options.runs)} or --all")
    return started_runs() or [find_run(None)]  # raises the error that there are no runs


def _show(directories: Sequence[Path], options: argparse.Namespace, redrawn: bool = False) -> int:
    now = time.time()
    several = options.all or len(directories) > 1
    read = _status_or_error if several else _status
    statuses = [read(directory, now) for directory in directories]
    text = _as_json(statuses, several) if options.json else _as_text(statuses, several)
    print(_CLEAR + text if redrawn else text, flush=True)
    if options.alert:
        for directory, status in zip(directories, statuses, strict=True):
            if isinstance(status, Status):
                news.send_news(directory, status)
    is_healthy = all(isinstance(status, Status) and status.healthy for status in statuses)
    return exit_codes.DONE if is_healthy else exit_codes.CRASHED


@dataclass(frozen=True)
class _Unreadable:
    """A run that cannot be read; the other runs are shown as usual."""

    run: str
    error: str


def _status(directory: Path, now: float) -> Status:
    try:
        return read_status(directory, now)
    except OSError as error:
        raise UserError(f"{error.filename or directory} cannot be read: {error.strerror}") from None


def _status_or_error(directory: Path, now: float) -> Status | _Unreadable:
    try:
        return _status(directory, now)
    except UserError as error:
        return _Unreadable(directory.name, str(error))


def _as_json(statuses: Sequence[Status | _Unreadable], several: bool) -> str:
    found = [dataclasses.asdict(status) for status in statuses]
    return json.dumps(found if several else found[0])


def _as_text(statuses: Sequence[Status | _Unreadable], several: bool) -> str:
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if not several and isinstance(statuses[0], Status):
        return screen.screen(statuses[0], colored)
    return "\n".join(
        screen.line(each, colored) if isinstance(each, Status) else terminal.one_line(f"{each.run}: {each.error}")
        for each in statuses
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= _LONGEST_WATCH_SECONDS:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 86,400; put RUN before --watch")
