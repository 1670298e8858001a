"""Messages of ``status --alert``: one when a run becomes unhealthy, one when it is healthy again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import replace_file
from ds_gpt2.config.run_location import load_run_settings
from ds_gpt2.run_dir.journal import Kind
from ds_gpt2.tools.status.screen import screen
from ds_gpt2.tools.status.status import Status

MEMORY = "status_alert.json"  # in the run's directory: the kinds of problems that have been reported

_HEALTHY_KINDS: dict[str, Kind] = {"finished": "done", "stopped": "stop"}  # by state; for other states "launch"


@dataclass(frozen=True)
class News:
    kind: Kind
    title: str
    text: str


def send_news(run_dir: Path, status: Status) -> None:
    """Send a message if the problems changed since the last message; each kind of problem is reported once.

    Raises:
        UserError: the settings of the run cannot be read.
    """
    reported = _reported(run_dir)
    current: set[str] = {problem.kind for problem in status.problems}
    news = news_of(status, reported)
    if news is not None and not _send(run_dir, news):
        return  # the next call tries again
    if current != reported:
        _remember(run_dir, current)


def news_of(status: Status, reported: set[str]) -> News | None:
    """Return the message to send; None if nothing changed.

    Args:
        reported: the kinds of problems that have been reported.
    """
    new = [problem for problem in status.problems if problem.kind not in reported]
    if new:
        return News(new[0].kind, f"{status.run}: {status.state}: {new[0].text}", screen(status))
    if reported and not status.problems:
        kind = _HEALTHY_KINDS.get(status.state, "launch")
        return News(kind, f"{status.run}: {status.state}, healthy again", screen(status))
    return None


def _send(run_dir: Path, news: News) -> bool:
    from ds_gpt2.supervision.alerts.alerts import Alerts  # imported here: most calls send nothing and must be fast

    alerts = Alerts(load_run_settings(run_dir).alerts, run_dir)
    return alerts.send(news.kind, news.title, news.text)


def _reported(run_dir: Path) -> set[str]:
    try:
        return set(safe_json.read(run_dir / MEMORY)["problems"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remember(run_dir: Path, kinds: set[str]) -> None:
    with contextlib.suppress(OSError):  # on a full disk, a problem is reported more than once
        replace_file(run_dir / MEMORY, json.dumps({"problems": sorted(kinds)}))
