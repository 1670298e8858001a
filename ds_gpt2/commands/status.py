"""``status``: how a run is now, on one small screen; and whether all is well, for cron."""

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

from ds_gpt2.commands import status_news
from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.lookup import find_run, started_runs
from ds_gpt2.run_dir import exit_report
from ds_gpt2.tools.status import screen, status
from ds_gpt2.tools.status.status import Status

_WATCH_SECONDS, _LONGEST_WATCH_SECONDS = 10.0, 86_400.0
_CLEAR = "\033[H\033[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories of runs (default: the newest run)")
    parser.add_argument("--all", action="store_true", help="every run, a line each")
    parser.add_argument("--json", action="store_true", help="print JSON: an object; of several runs a list")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=_WATCH_SECONDS,
        metavar="SECONDS",
        help=f"look again every {_WATCH_SECONDS:g} seconds, until Ctrl+C",
    )
    parser.add_argument("--alert", action="store_true", help="send a message when it gets well or ill, for cron")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 if all is well with all runs, 1 if not."""
    directories = _directories(options)
    if options.watch is None:
        return _show(directories, options)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _show(directories, options, redrawn=sys.stdout.isatty() and not options.json)
            time.sleep(options.watch)
    return exit_report.DONE


def _directories(options: argparse.Namespace) -> list[Path]:
    if not options.all:
        return [find_run(name) for name in dict.fromkeys(options.runs) or [None]]
    if options.runs:
        raise UserError(f"--all shows every run: leave out {' '.join(options.runs)}, or --all")
    return started_runs() or [find_run(None)]  # which says that there are none


def _show(directories: Sequence[Path], options: argparse.Namespace, redrawn: bool = False) -> int:
    now = time.time()
    several = options.all or len(directories) > 1
    looks = [_look_or_problem(directory, now) if several else _look(directory, now) for directory in directories]
    text = _as_json(looks, several) if options.json else _as_text(looks, several)
    print(_CLEAR + text if redrawn else text, flush=True)
    if options.alert:
        for directory, look in zip(directories, looks, strict=True):
            if isinstance(look, Status):
                status_news.tell(directory, look)
    is_healthy = all(isinstance(look, Status) and look.healthy for look in looks)
    return exit_report.DONE if is_healthy else exit_report.CRASHED


@dataclass(frozen=True)
class _Unreadable:
    """A run that cannot be read; the others are shown as usual."""

    run: str
    error: str


def _look(directory: Path, now: float) -> Status:
    try:
        return status.look(directory, now)
    except OSError as error:
        raise UserError(f"{error.filename or directory} cannot be read: {error.strerror}") from None


def _look_or_problem(directory: Path, now: float) -> Status | _Unreadable:
    try:
        return _look(directory, now)
    except UserError as error:
        return _Unreadable(directory.name, str(error))


def _as_json(looks: Sequence[Status | _Unreadable], several: bool) -> str:
    found = [dataclasses.asdict(look) for look in looks]
    return json.dumps(found if several else found[0])


def _as_text(looks: Sequence[Status | _Unreadable], several: bool) -> str:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if not several and isinstance(looks[0], Status):
        return screen.screen(looks[0], coloured)
    return "\n".join(
        screen.line(look, coloured) if isinstance(look, Status) else terminal.one_line(f"{look.run}: {look.error}")
        for look in looks
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= _LONGEST_WATCH_SECONDS:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to 86,400; a RUN stands before --watch")
