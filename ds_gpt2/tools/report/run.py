"""What the files of a run tell: its records, its starts, what befell it, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.files import read_small
from ds_gpt2.config.run_location import load_run_settings, public_tree
from ds_gpt2.config.settings import Settings, to_yaml
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.metrics import METRICS, STARTS, TIME, planned_steps, read_starts
from ds_gpt2.run_dir.notes import NOTES
from ds_gpt2.tools.report.curves import Curves, read_records
from ds_gpt2.tools.resources.history import lost_by_start, newest_events, restarts_of
from ds_gpt2.tools.resources.run_steps import total_steps

CONFIG = "config.yaml"

_SAME_START_SECONDS = 60.0  # between the two records of a start
_ENDS = frozenset({"done", "stop", "mistake", "gave_up"})
_BEGINS = frozenset({"launch", "start", "restart"})


@dataclass(frozen=True)
class Start:
    """One line of ``starts.jsonl``."""

    time: float | None  # seconds since 1970
    from_step: int
    world_size: int | None
    commit: str | None
    lost_seconds: float | None = None  # by the journal; where there is none see `_lost`
    restart: bool = False  # made by the supervisor


@dataclass(frozen=True)
class Run:
    """A run as its files are now."""

    name: str
    settings: Settings
    settings_text: str
    records: Curves
    starts: list[Start]  # in the order of the file
    events: list[Event]  # of the journal, the oldest first
    planned: int | None  # steps that it is to have, as its newest start said
    checkpoints: list[Generation]  # newest first
    notes: str | None
    ending: str | None  # how it ended; None if it still trains, or if nothing is known

    @property
    def steps(self) -> int | None:
        """How many it is to have; None where that follows from the data and nothing is recorded yet."""
        epoch, step = self.records.curve("train/epoch").last(), self.records.newest
        return total_steps(self.settings.schedule, self.planned, epoch / step if epoch else None)

    def since(self, time: float) -> Run:
        """What belongs to ``time``, in seconds since 1970, and later; settings and notes stay."""
        return replace(
            self,
            records=self.records.since(time),
            starts=[start for start in self.starts if start.time is not None and start.time >= time],
            events=[event for event in self.events if event.time >= time],
            checkpoints=[one for one in self.checkpoints if one.manifest and one.manifest.made_at >= time],
        )


def load_run(directory: Path) -> Run:
    """The run in ``directory``; files that are missing leave their part empty.

    Raises:
        UserError: its settings cannot be read.
    """
    settings = load_run_settings(directory)
    records = read_records(directory / METRICS)
    lines = read_starts(directory / STARTS)
    events = newest_events(directory)
    return Run(
        name=settings.run.name,
        settings=settings,
        settings_text=to_yaml(public_tree(settings)),
        records=records,
        starts=_starts([_start(line) for line in lines], records, events),
        events=events,
        planned=planned_steps(lines),
        checkpoints=catalog.scan(settings.checkpoint_dir),
        notes=_text_of(directory / NOTES),
        ending=_ending(events),
    )


def _starts(starts: list[Start], records: Curves, events: list[Event]) -> list[Start]:
    """With what the journal tells about each: what it cost, and who made it."""
    noted = [event for event in events if event.kind == "start"]
    if not noted:
        return [
            replace(start, lost_seconds=_lost(start, starts[place + 1 :], records))
            for place, start in enumerate(starts)
        ]
    lost, restarts = lost_by_start(events), restarts_of(events)
    places = [_place_of(start, noted) for start in starts]
    return [
        start if place is None else replace(start, lost_seconds=lost.get(noted[place].time), restart=restarts[place])
        for start, place in zip(starts, places, strict=True)
    ]


def _place_of(start: Start, noted: list[Event]) -> int | None:
    """Which of the journal's starts is this one."""
    if start.time is None:
        return None
    apart = [
        (abs(event.time - start.time), place) for place, event in enumerate(noted) if event.step == start.from_step
    ]
    seconds, place = min(apart, default=(math.inf, 0))
    return place if seconds <= _SAME_START_SECONDS else None


def _lost(start: Start, later: list[Start], records: Curves) -> float | None:
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
        return read_small(file).decode(errors="replace")
    except FileNotFoundError:
        return None


def _ending(events: Sequence[Event]) -> str | None:
    """How the last process ended, by the journal; None if it still trains, or could not write why it ended."""
    for event in reversed(events):
        if event.kind in _ENDS or event.facts.get("ended"):
            return event.text
        if event.kind in _BEGINS:
            return None
    return None
