"""Is anybody at work on a run, and at what? By the processes that there are, and by the last word of those gone."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.common.files import read_small
from ds_gpt2.common.formatting import duration
from ds_gpt2.common.process_start import is_running
from ds_gpt2.config.settings import Settings, SupervisorSettings
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import Beat, beat_mtime, read_beat
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.supervisor_record import RECORD, SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision.watchdog import longest_silence

State = Literal[
    "starting",
    "running",
    "evaluating",
    "saving",
    "finishing",
    "waiting",  # for the supervisor to start it again
    "hung?",  # no sign of life for longer than it should take
    "finished",
    "stopped",  # on request
    "mistake",  # of the user's
    "gave up",
    "dead",  # nobody is left, and nobody said why
]

AT_WORK: frozenset[State] = frozenset({"starting", "running", "evaluating", "saving", "finishing"})
TRAINED: frozenset[State] = frozenset({"running", "evaluating", "saving", "finishing", "finished", "stopped"})

_BY_PHASE: dict[str, State] = {
    "starting": "starting",
    "training": "running",
    "evaluating": "evaluating",
    "saving": "saving",
    "finishing": "finishing",
}
_LAST_WORDS: dict[str, State] = {"done": "finished", "stop": "stopped", "mistake": "mistake", "gave_up": "gave up"}
_BY_CODE: dict[int, State] = {
    exit_report.DONE: "finished",
    exit_report.STOPPED: "stopped",
    exit_report.MISTAKE: "mistake",
}
_ENDS = frozenset({"crash", "hang", "restart", *_LAST_WORDS})  # of the ranks: none of that start is left
_TURNS = frozenset({"launch", "start", "crash", "hang", "restart", "rollback", *_LAST_WORDS})

_SAME_TIME_SECONDS = 2.0  # a process begins before it says so, but for the rounding of clocks
_OVERDUE_SECONDS = 60.0  # a start may come so much later than announced


@dataclass(frozen=True)
class Life:
    """What a run is at."""

    state: State
    why: str | None = None  # where the state needs a word more
    beat: Beat | None = None  # the newest sign of life of a rank that is there
    next_start: float | None = None  # seconds since 1970, while it waits
    overdue: bool = False  # that start should have come
    is_here: bool = True  # on this machine, as far as is known


def look(run_dir: Path, settings: Settings, events: Sequence[Event], step_seconds: float | None, now: float) -> Life:
    """
    Args:
        events: of the journal, the newest ones at least.
        step_seconds: what a step usually takes; None where not known.
        now: seconds since 1970.
    """
    supervisor = read_supervisor_record(run_dir)
    here = _host(supervisor, settings.checkpoint_dir / LOCK) in (socket.gethostname(), None)
    return replace(_life(run_dir, settings, events, step_seconds, now, supervisor, here), is_here=here)


def _life(
    run_dir: Path,
    settings: Settings,
    events: Sequence[Event],
    step_seconds: float | None,
    now: float,
    supervisor: SupervisorRecord | None,
    here: bool,
) -> Life:
    turns = [event for event in events if event.kind in _TURNS]
    beats = _beats(run_dir)
    if not here:
        beats = {rank: _by_any_clock(run_dir, rank, beat) for rank, beat in beats.items()}
    patience = _Patience(settings.supervisor, step_seconds, _first_step(turns))
    if here:
        living = {rank: beat for rank, beat in beats.items() if _is_there(beat)}
    else:
        living = _still_beating(beats, turns, patience, now)
    if living:
        return _of_ranks(living, patience, now)
    if supervisor is not None and supervisor.is_alive:
        return _of_supervisor(supervisor, turns, list(beats.values()), settings.supervisor, now)
    return _of_the_past(run_dir, supervisor, turns)


def _still_beating(beats: dict[int, Beat], turns: Sequence[Event], patience: _Patience, now: float) -> dict[int, Beat]:
    """Ranks on another machine, whose processes cannot be seen: by their signs of life.

    Once the journal says that they have ended, no sign of life counts: it was given before. The order of the journal
    tells, not the clocks of two machines.
    """
    ended = bool(turns) and turns[-1].kind in _ENDS
    begun_again = ended and turns[-1].kind in ("done", "stop")  # by hand: it is in the journal once it trains
    return {
        rank: beat
        for rank, beat in beats.items()
        if patience.left(beat, now) > 0 and (not ended or (begun_again and beat.phase == "starting"))
    }


@dataclass(frozen=True)
class _Patience:
    """How long a rank may go without a sign of life, by the watchdog's measure."""

    settings: SupervisorSettings
    step_seconds: float | None
    first_step: int

    def left(self, beat: Beat, now: float) -> float:
        """Seconds."""
        in_step = beat.phase == "training" and beat.step > self.first_step
        return longest_silence(self.settings, in_step, self.step_seconds) - (now - beat.time)


def _of_ranks(living: dict[int, Beat], patience: _Patience, now: float) -> Life:
    main = living.get(0) or next(iter(living.values()))
    late = {rank: beat for rank, beat in living.items() if patience.left(beat, now) < 0}
    if not late:
        return Life(_BY_PHASE.get(main.phase, "running"), beat=main)
    rank, beat = min(late.items(), key=lambda item: item[1].time)
    silent = duration(now - beat.time)
    return Life("hung?", f"rank {rank} has not moved for {silent} in step {beat.step:,} ({beat.phase})", main)


def _of_supervisor(
    supervisor: SupervisorRecord,
    turns: Sequence[Event],
    beats: Sequence[Beat],
    settings: SupervisorSettings,
    now: float,
) -> Life:
    """There is a supervisor, and no rank yet or any more."""
    if supervisor.state == "waiting":
        start = supervisor.next_start
        return Life("waiting", next_start=start, overdue=start is not None and now > start + _OVERDUE_SECONDS)
    last = turns[-1] if turns else None
    if last is not None and last.kind in _LAST_WORDS:  # it is about to end, too
        return Life(_LAST_WORDS[last.kind])
    if last is None or last.kind == "launch":
        since = supervisor.started if last is None else last.time
        silent = now - since > 60 * settings.patience_minutes
        return Life("hung?", f"no rank has begun for {duration(now - since)}") if silent else Life("starting")
    newest = max([last.time, *(beat.time for beat in beats)])
    silent = now - newest > settings.stop_seconds + _OVERDUE_SECONDS
    return Life("hung?", f"no rank is left for {duration(now - newest)}") if silent else Life("waiting")


def _of_the_past(run_dir: Path, supervisor: SupervisorRecord | None, turns: Sequence[Event]) -> Life:
    """Nobody is there: what was the last word?"""
    last = turns[-1] if turns else None
    its_own = supervisor is not None and (last is None or _is_older(last, run_dir / RECORD))
    if last is not None and last.kind in _LAST_WORDS:
        if last.kind == "stop" and _was_launched(turns) and supervisor is not None and supervisor.state != "ended":
            return Life("dead", "the supervisor was killed; the ranks have saved and ended")
        return Life(_LAST_WORDS[last.kind], last.text if last.kind in ("mistake", "gave_up") else None)
    if supervisor is not None and its_own and supervisor.state == "ended":
        if supervisor.code is not None and supervisor.code in _BY_CODE:
            return Life(_BY_CODE[supervisor.code])
        if last is None or last.kind == "launch":  # a request that came before there was anything to save
            return Life("stopped")
        return Life("dead", "it ended without having saved its last state")
    return Life("dead", last.text if last is not None and last.kind in ("crash", "hang") else None)


def _is_older(event: Event, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return event.time <= file.stat().st_mtime + _SAME_TIME_SECONDS
    return False


def _was_launched(turns: Sequence[Event]) -> bool:
    """Whether a supervisor had started the ranks that had the last word."""
    starts = itertools.takewhile(lambda event: event.kind in ("launch", "start"), reversed(turns[:-1]))
    return any(event.kind == "launch" for event in starts)


def _first_step(turns: Sequence[Event]) -> int:
    """The first step of the newest start."""
    return next((event.step or 0 for event in reversed(turns) if event.kind == "start"), 0) + 1


def _beats(run_dir: Path) -> dict[int, Beat]:
    """The newest signs of life by rank, also of processes that are gone."""
    found = itertools.takewhile(lambda beat: beat is not None, (read_beat(run_dir, rank) for rank in itertools.count()))
    return {rank: beat for rank, beat in enumerate(found) if beat is not None}


def _by_any_clock(run_dir: Path, rank: int, beat: Beat) -> Beat:
    """The clock of a rank's machine may be slow: then the time that the file system gave the file is newer."""
    written = beat_mtime(run_dir, rank)
    return beat if written is None else replace(beat, time=max(beat.time, written))


def _is_there(beat: Beat) -> bool:
    """Whether the process that beat is on this machine still: one that begun later has only been given its number."""
    try:
        if beat.start:
            return is_running(beat.pid, beat.start)
        process = psutil.Process(beat.pid)  # an earlier version's
        begun_before = process.create_time() <= beat.time + _SAME_TIME_SECONDS
        return begun_before and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _host(supervisor: SupervisorRecord | None, lock: Path) -> str | None:
    """The machine that the ranks are on, by the one who trains the run or who watches over it; None if not told."""
    with contextlib.suppress(OSError):
        _, _, host = read_small(lock).decode(errors="replace").strip().partition(" on ")
        if host:
            return host
    return supervisor.host if supervisor is not None else None
