"""Files of a run: records, starts, journal, checkpoints, notes."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.files import read_small
from ds_gpt2.common.terminal import one_line
from ds_gpt2.config.run_location import load_run_settings, public_tree
from ds_gpt2.config.settings import Settings, to_yaml
from ds_gpt2.run_dir.file_checks import RESTORE_METRICS, metrics_problem, read_error
from ds_gpt2.run_dir.fork_record import Fork, read_fork
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.last_step import last_step
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.notes import NOTES
from ds_gpt2.run_dir.starts import planned_steps, read_starts, time_of
from ds_gpt2.tools.report.curves import Curves, read_records
from ds_gpt2.tools.resources.history import lost_by_start, newest_events, restarts_of
from ds_gpt2.tools.resources.run_steps import epochs_per_step, total_steps

_SAME_START_SECONDS = 60.0  # largest difference between the two records of a start


@dataclass(frozen=True)
class Start:
    """One line of ``starts.jsonl``."""

    time: float | None  # seconds since 1970
    from_step: int
    world_size: int | None
    commit: str | None
    lost_seconds: float | None = None  # seconds lost before it; see `history.lost_by_start`
    restart: bool = False  # made by the supervisor


@dataclass(frozen=True)
class Run:
    """A run as its files are now."""

    directory: Path
    name: str
    settings: Settings
    settings_text: str
    records: Curves
    starts: list[Start]  # in the order of the file
    events: list[Event]  # of the journal, the oldest first
    planned: int | None  # planned steps, as recorded by the newest start
    checkpoints: list[Generation]  # newest first
    notes: str | None
    fork: Fork | None = None  # the run's parent; None if it is not a fork

    @property
    def steps(self) -> int | None:
        """Planned steps; None if they follow from the data and nothing is recorded yet."""
        newest = self.records.curve("train/epoch").newest()
        records = [] if newest is None else [{"step": newest[0], "train/epoch": newest[1]}]
        return total_steps(self.settings.schedule, self.planned, epochs_per_step(records))

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint that the run can resume from; 0 if there is none."""
        return next((one.step for one in self.checkpoints if one.is_resumable), 0)

    @property
    def metrics_problem(self) -> str | None:
        """What is wrong with the metrics if the run has checkpoints but no records; else None."""
        return metrics_problem(self.directory, self.records.newest, self.saved_step)

    def last_step(self, beat: Beat | None = None) -> int:
        """Return the last completed step, as ``status`` does.

        Args:
            beat: the newest heartbeat of a rank that exists.
        """
        return last_step(self.records.newest, beat, self.saved_step)

    def since(self, time: float) -> Run:
        """Return the run reduced to ``time`` (seconds since 1970) and later; settings and notes are unchanged."""
        return replace(
            self,
            records=self.records.since(time),
            starts=[start for start in self.starts if start.time is not None and start.time >= time],
            events=[event for event in self.events if event.time >= time],
            checkpoints=[one for one in self.checkpoints if one.manifest and one.manifest.made_at >= time],
        )


def load_run(directory: Path) -> Run:
    """Read the run in ``directory``; missing files leave their part empty, with a warning if the metrics are missing.

    Raises:
        UserError: a file of the run cannot be read.
    """
    try:
        run = _load_run(directory)
    except OSError as error:
        raise read_error(error, directory) from None
    if (problem := run.metrics_problem) is not None:
        print(f"warning: {one_line(problem)}; {RESTORE_METRICS}", file=sys.stderr)
    return run


def _load_run(directory: Path) -> Run:
    settings = load_run_settings(directory)
    records = read_records(directory / METRICS)
    lines = read_starts(directory)
    events = newest_events(directory)
    return Run(
        directory=directory,
        name=settings.run.name,
        settings=settings,
        settings_text=to_yaml(public_tree(settings)),
        records=records,
        starts=_starts([_start(line) for line in lines], records, events),
        events=events,
        planned=planned_steps(lines),
        checkpoints=catalog.scan(settings.checkpoint_dir),
        notes=_text_of(directory / NOTES),
        fork=read_fork(directory),
    )


def _starts(starts: list[Start], records: Curves, events: list[Event]) -> list[Start]:
    """Add the lost time and the origin of each start, from the journal."""
    recorded = [event for event in events if event.kind == "start"]
    if not recorded:
        return _starts_without_journal(starts, records)
    lost, restarts = lost_by_start(events), restarts_of(events)
    indices = [_index_of(start, recorded) for start in starts]
    return [
        start if index is None else replace(start, lost_seconds=lost.get(recorded[index].time), restart=restarts[index])
        for start, index in zip(starts, indices, strict=True)
    ]


def _index_of(start: Start, recorded: list[Event]) -> int | None:
    """Return the index of ``start`` among the starts of the journal; None if it is not there."""
    if start.time is None:
        return None
    differences = [
        (abs(event.time - start.time), index) for index, event in enumerate(recorded) if event.step == start.from_step
    ]
    seconds, index = min(differences, default=(math.inf, 0))
    return index if seconds <= _SAME_START_SECONDS else None


def _starts_without_journal(starts: list[Start], records: Curves) -> list[Start]:
    """Add the lost time of runs without a journal, from the events that their records imply.

    Records continue from the last step before a start to the first step after it. A start followed by another start
    from the same step or an earlier one has left no records.
    """
    events: list[Event] = []
    times: list[float | None] = []
    for number, start in enumerate(starts):
        before = int(records.steps.searchsorted(start.from_step, side="right")) - 1
        is_repeated = any(other.from_step <= start.from_step for other in starts[number + 1 :])
        if is_repeated or not 0 <= before < len(records.steps) - 1:
            times.append(None)
            continue
        step = int(records.steps[before + 1])
        step_ms = records.curve("perf/step_ms").since(step).until(step).last() or 0.0
        resumed = float(records.times[before + 1]) - step_ms / 1000
        events.append(Event(float(records.times[before]), "save", "", start.from_step))
        events.append(Event(resumed, "start", "", start.from_step))
        times.append(resumed)
    lost = lost_by_start(events)
    return [
        replace(start, lost_seconds=None if time is None else lost.get(time, 0.0))
        for start, time in zip(starts, times, strict=True)
    ]


def _start(line: dict[str, Any]) -> Start:
    commit = line.get("git_commit")
    return Start(
        time=time_of(line),
        from_step=_whole(line.get("from_step")) or 0,
        world_size=_whole(line.get("world_size")),
        commit=commit if isinstance(commit, str) else None,
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _text_of(file: Path) -> str | None:
    try:
        return read_small(file).decode(errors="replace")
    except FileNotFoundError:
        return None
