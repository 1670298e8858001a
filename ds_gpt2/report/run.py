"""What the files of a run tell: its records, its starts, what befell it, its checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import generations
from ds_gpt2.checkpoint.generations import Generation
from ds_gpt2.config import Settings
from ds_gpt2.metrics import METRICS, STARTS, TIME
from ds_gpt2.notes import NOTES
from ds_gpt2.report.records import Records, read_records
from ds_gpt2.run_location import load_run_settings

CONFIG, LOG, JOURNAL = "config.yaml", "train.log", "journal.jsonl"

_TAIL = 1 << 16  # bytes of the log that are looked at
_ENDING = re.compile(r"^\S+ \S+ (done|stopped on request|ended, but its last state could not be saved) at step \d+ of ")
_AT_WORK = re.compile(r"^\S+ \S+ (run \S+: |step +\d+/\d+ )")


@dataclass(frozen=True)
class Start:
    """One line of ``starts.jsonl``."""

    time: float | None  # seconds since 1970
    from_step: int
    world_size: int | None
    commit: str | None
    lost_seconds: float | None = None  # see `_lost`


@dataclass(frozen=True)
class Incident:
    """One line of ``journal.jsonl``."""

    time: float | None  # seconds since 1970
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """A run as its files are now."""

    name: str
    settings: Settings
    settings_text: str
    records: Records
    starts: list[Start]  # in the order of the file
    incidents: list[Incident]
    checkpoints: list[Generation]  # newest first
    notes: str | None
    ending: str | None  # what the log says of its end; None where it goes on, or has died without a word

    @property
    def steps(self) -> int | None:
        """How many it is to have; None where that follows from the data and nothing is recorded yet."""
        schedule = self.settings.schedule
        if schedule.steps is not None:
            return schedule.steps
        epoch, step = self.records.curve("train/epoch").last(), self.records.newest
        if not epoch or schedule.epochs is None:
            return None
        return math.ceil(schedule.epochs * step / epoch - 1e-6)  # as TrainingData.steps_for

    def since(self, time: float) -> Run:
        """What belongs to ``time``, in seconds since 1970, and later; settings and notes stay."""
        return replace(
            self,
            records=self.records.since(time),
            starts=[start for start in self.starts if start.time is not None and start.time >= time],
            incidents=[one for one in self.incidents if one.time is not None and one.time >= time],
            checkpoints=[one for one in self.checkpoints if one.manifest and one.manifest.made_at >= time],
        )


def load_run(directory: Path) -> Run:
    """The run in ``directory``; files that are missing leave their part empty.

    Raises:
        UserError: its settings cannot be read.
    """
    settings = load_run_settings(directory)
    records = read_records(directory / METRICS)
    starts = [_start(line) for line in _json_lines(directory / STARTS)]
    return Run(
        name=settings.run.name,
        settings=settings,
        settings_text=_text_of(directory / CONFIG) or "",
        records=records,
        starts=[
            replace(start, lost_seconds=_lost(start, starts[place + 1 :], records))
            for place, start in enumerate(starts)
        ],
        incidents=[_incident(line) for line in _json_lines(directory / JOURNAL)],
        checkpoints=generations.scan(settings.checkpoint_dir),
        notes=_text_of(directory / NOTES),
        ending=_ending(directory / LOG),
    )


def _lost(start: Start, later: list[Start], records: Records) -> float | None:
    """Seconds from the last step that counts before ``start`` to the first one after it, that one's own time left out.

    That is the time the run lay still, and the work that was not saved and had to be done again. None where a later
    start went back as far or further: then that one tells; and where nothing is recorded on either side.
    """
    before = int(records.steps.searchsorted(start.from_step, side="right")) - 1
    if any(other.from_step <= start.from_step for other in later) or not 0 <= before < len(records.steps) - 1:
        return None
    step = int(records.steps[before + 1])
    took = records.curve("perf/step_ms").since(step).until(step).last() or 0.0
    return max(0.0, float(records.times[before + 1] - records.times[before]) - took / 1000)


def _start(line: dict[str, Any]) -> Start:
    commit = line.get("git_commit")
    return Start(
        time=_time(line.get("time")),
        from_step=_whole(line.get("from_step")) or 0,
        world_size=_whole(line.get("world_size")),
        commit=commit if isinstance(commit, str) else None,
    )


def _incident(line: dict[str, Any]) -> Incident:
    return Incident(
        time=_time(line.get("time")),
        step=_whole(line.get("step")),
        kind=str(line.get("kind", "")),
        text=str(line.get("text", "")),
    )


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in ``file``; lines cut by a crash are left out."""
    for line in (_text_of(file) or "").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _time(value: object) -> float | None:
    """Seconds since 1970, from a number of them or from a text as in ``starts.jsonl``."""
    if isinstance(value, float | int):
        return float(value)
    try:
        return datetime.strptime(str(value), TIME).timestamp()
    except (ValueError, OverflowError):
        return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _ending(log: Path) -> str | None:
    """How the last process to write to ``log`` said that it ended."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        if said := _ENDING.match(line):
            return said[1]
        if _AT_WORK.match(line):
            return None
    return None
