"""What ``status --alert`` sends: one message when a run gets ill, and one when it is well again."""

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

MEMORY = "status_alert.json"  # in the run's directory: the problems that have been told

_WELL: dict[str, Kind] = {"finished": "done", "stopped": "stop"}  # the kind of good news; else that of a start


@dataclass(frozen=True)
class News:
    kind: Kind
    title: str
    text: str


def tell(run_dir: Path, status: Status) -> None:
    """Send what is new since the last call that could; the same problem is told once, whatever its figures."""
    told = _told(run_dir)
    now: set[str] = {problem.kind for problem in status.problems}
    news = news_of(status, told)
    if news is not None and not _send(run_dir, news):
        return  # and try again next time
    if now != told:
        _remember(run_dir, now)


def news_of(status: Status, told: set[str]) -> News | None:
    """What to say to somebody who knows of problems of the kinds ``told``; None if that is all there is."""
    fresh = [problem for problem in status.problems if problem.kind not in told]
    if fresh:
        return News(fresh[0].kind, f"{status.run}: {status.state}: {fresh[0].text}", screen(status))
    if told and not status.problems:
        return News(
            _WELL.get(status.state, "launch"), f"{status.run}: {status.state}, all is well again", screen(status)
        )
    return None


def _send(run_dir: Path, news: News) -> bool:
    from ds_gpt2.supervision.alerts.alerts import Alerts  # only here: most looks send nothing, and are to be quick

    alerts = Alerts(load_run_settings(run_dir).alerts, run_dir)
    return alerts.send(news.kind, news.title, news.text)


def _told(run_dir: Path) -> set[str]:
    try:
        return set(safe_json.read(run_dir / MEMORY)["problems"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remember(run_dir: Path, kinds: set[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: then it is told more than once
        replace_file(run_dir / MEMORY, json.dumps({"problems": sorted(kinds)}))
