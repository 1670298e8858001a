"""Files of a run as the report reads them, and a parser of the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TextIO

from ds_gpt2.run_dir.starts import TIME
from ds_gpt2.tools.report.charts import charts_of, views_of
from ds_gpt2.tools.report.page import RunSection, render
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import summarize

NOW = 1_800_000_000.0
HOUR = 3600.0

CONFIG = """
run: {name: NAME, dir: RUNS}
model: {preset: PRESET}
data: {dir: data}
batch: {tokens_per_step: 1024, micro_batch: 1}
schedule: {steps: 100, warmup_steps: 1}
checkpoint: {dir: CHECKPOINTS}
samples: {prompts: ["Say <b>"]}
"""

WriteRun = Callable[..., Path]


def record(step: int, **more: Any) -> dict[str, Any]:
    """Return the record of one step of 2 s; step 40 ends at ``NOW``."""
    numbers = {"train/loss": 10 / step, "train/grad_norm": 1.0 + step, "train/tokens": 1024.0 * step}
    return {"step": step, "time": NOW - 2 * (40 - step), **numbers, "perf/step_ms": 2000.0, **more}


def start(time_of_start: float, from_step: int) -> dict[str, Any]:
    """Return a line of ``starts.jsonl``."""
    return {"time": time.strftime(TIME, time.localtime(time_of_start)), "from_step": from_step, "world_size": 2}


def journal(directory: Path, *events: tuple[str, float, int, dict[str, Any]]) -> None:
    """Write events as (kind, seconds before ``NOW``, step, facts)."""
    lines = [
        {"time": NOW - ago, "kind": kind, "step": step, "text": f"{kind} at {step}", "facts": facts}
        for kind, ago, step, facts in events
    ]
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


_opened: list[TextIO] = []  # a rank keeps its heartbeat open


def beat(directory: Path, at: float = NOW, step: int = 41) -> None:
    """Write a heartbeat of this process as rank 0, in the format of an earlier version, which has no start time."""
    (directory / "heartbeat").mkdir()
    file = (directory / "heartbeat" / "rank_00000").open("w")
    file.write(f"9 {at} {os.getpid()} {step} {step} training")
    file.flush()
    _opened.append(file)


class Page(HTMLParser):
    """The page as a browser parses it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()
        self.figures = {figure["id"]: figure for figure in json.loads(self.scripts[1])}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def traces(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the traces of one chart by name."""
        return {trace["name"]: trace for trace in self.figures[f"chart-{number}"]["traces"]}


def rendered(*directories: Path, now: float = NOW, since: float | None = None) -> Page:
    """Render the report of runs.

    Args:
        since: length of the time window in seconds.
    """
    runs = [load_run(directory) for directory in directories]
    summaries = [summarize(run, now, since_seconds=since) for run in runs]
    if since is not None:
        runs = [run.since(now - since) for run in runs]
    parts = [RunSection(run, summary) for run, summary in zip(runs, summaries, strict=True)]
    views = views_of([(run.name, run.settings, run.records) for run in runs])
    return Page(render(parts, charts_of(views), now))
