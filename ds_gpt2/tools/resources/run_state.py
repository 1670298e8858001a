"""State of a run: from its processes, or from the last journal event if no process exists."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.common.formatting import clock, duration
from ds_gpt2.common.lease import LEASE_SECONDS
from ds_gpt2.common.locks import last_host
from ds_gpt2.common.process_identity import is_running, was_running_by_clock
from ds_gpt2.config.settings import Settings, SupervisorSettings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import Beat, beat_mtime, is_of_original, read_beat
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.supervisor_record import RECORD, SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision.watchdog import longest_silence

State = Literal[
    "starting",
    "running",
    "evaluating",
    "saving",
    "finishing",
    "waiting",  # until the supervisor restarts the ranks
    "hung?",  # no heartbeat for longer than the watchdog allows
    "finished",
    "stopped",  # on request
    "mistake",  # error in the user's configuration
    "gave up",
    "dead",  # no process exists, and no event explains why
]

ACTIVE: frozenset[State] = frozenset({"starting", "running", "evaluating", "saving", "finishing"})
TRAINING_OR_DONE: frozenset[State] = frozenset({"running", "evaluating", "saving", "finishing", "finished", "stopped"})

_BY_PHASE: dict[str, State] = {
    "starting": "starting",
    "training": "running",
    "evaluating": "evaluating",
    "saving": "saving",
    "finishing": "finishing",
}
_FINAL: dict[str, State] = {"done": "finished", "stop": "stopped", "mistake": "mistake", "gave_up": "gave up"}
_BY_CODE: dict[int, State] = {
    exit_codes.DONE: "finished",
    exit_codes.STOPPED: "stopped",
    exit_codes.MISTAKE: "mistake",
}
_RANKS_ENDED = frozenset({"crash", "hang", "restart", *_FINAL})  # no rank of that start exists any more
_STATE_EVENTS = frozenset({"launch", "start", "crash", "hang", "restart", "rollback", *_FINAL})

_SAME_TIME_SECONDS = 2.0  # a process starts before it writes its first record, apart from clock rounding
_OVERDUE_SECONDS = 60.0  # a restart may be this much later than announced


@dataclass(frozen=True)
class RunState:
    """State of a run, and the evidence for it."""

    state: State
    why: str | None = None  # the reason, for states that require one
    beat: Beat | None = None  # newest heartbeat of a rank that exists
    next_start: float | None = None  # seconds since 1970, while the supervisor waits
    overdue: bool = False  # that restart did not happen in time
    is_here: bool = True  # on this machine, or on an unknown one

    def finish_time(self, now: float, left_seconds: float | None) -> float | None:
        """Return when the run finishes, in seconds since 1970; None if it is not active or the time left is unknown.

        Args:
            now: seconds since 1970.
            left_seconds: time left, see ``ds_gpt2.monitoring.pace``.
        """
        return now + left_seconds if self.state in ACTIVE and left_seconds is not None else None


def read_run_state(
    run_dir: Path, settings: Settings, events: Sequence[Event], step_seconds: float | None, now: float
) -> RunState:
    """Return the state of the run in ``run_dir``.

    Args:
        events: journal events, at least the newest ones.
        step_seconds: usual seconds per step; None if not known.
        now: seconds since 1970.
    """
    supervisor = read_supervisor_record(run_dir)
    is_here = _host(supervisor, settings.checkpoint_dir / LOCK) in (socket.gethostname(), None)
    relevant = [event for event in events if event.kind in _STATE_EVENTS or _is_failed_end(event)]
    observed = _Observed(run_dir, settings.supervisor, supervisor, relevant, step_seconds, now)
    return replace(_state_of(observed, is_here), is_here=is_here)


def finished_by_checkpoint(state: RunState, newest: Generation | None, steps: int | None) -> RunState:
    """Return "finished" in place of "dead" if the final checkpoint is saved and evaluated.

    A run on a full disk may finish without its last journal event.

    Args:
        newest: the newest checkpoint.
        steps: steps of the whole run.
    """
    if state.state != "dead" or state.why is not None or newest is None or steps is None or newest.step < steps:
        return state
    if newest.manifest is not None and not newest.manifest.is_evaluated:
        return state
    return RunState("finished", is_here=state.is_here)


@dataclass(frozen=True)
class _Observed:
    """Evidence for the state of a run."""

    run_dir: Path
    settings: SupervisorSettings
    supervisor: SupervisorRecord | None
    events: Sequence[Event]  # those of ``_STATE_EVENTS``, the newest last
    step_seconds: float | None
    now: float

    @property
    def last_event(self) -> Event | None:
        return self.events[-1] if self.events else None

    @property
    def first_step(self) -> int:
        """First step of the newest start."""
        return next((event.step or 0 for event in reversed(self.events) if event.kind == "start"), 0) + 1

    @property
    def is_watched(self) -> bool:
        """Whether a supervisor with a valid lease runs, and has recorded no end of the ranks since their start."""
        supervisor, last = self.supervisor, self.last_event
        if supervisor is None or supervisor.renewed is None or not supervisor.is_alive(self.now):
            return False
        return supervisor.state == "running" and last is not None and last.kind == "start"

    def is_lost(self, beat: Beat) -> bool:
        """Return whether a rank on another host is lost together with its supervisor, whose lease has ended."""
        supervisor = self.supervisor
        if supervisor is None or supervisor.renewed is None or supervisor.is_alive(self.now):
            return False
        if not supervisor.has_expired(self.now):
            return False
        outlived_it = beat.time > supervisor.renewed + LEASE_SECONDS  # or was started later, by hand
        return not outlived_it and self.now - beat.time >= LEASE_SECONDS

    def seconds_until_hung(self, beat: Beat) -> float:
        """Return the seconds until the watchdog treats a rank as hung; negative if it does already."""
        in_step = beat.phase == "training" and beat.step > self.first_step
        return longest_silence(self.settings, in_step, self.step_seconds) - (self.now - beat.time)


def _state_of(observed: _Observed, is_here: bool) -> RunState:
    beats = _read_beats(observed.run_dir)
    elsewhere = {
        rank: _with_file_time(observed.run_dir, rank, beat)
        for rank, beat in beats.items()
        if beat.is_of_other_host or not (beat.host or is_here)
    }
    here = {rank: beat for rank, beat in beats.items() if rank not in elsewhere}
    active = {rank: beat for rank, beat in here.items() if _is_beating(observed.run_dir, rank, beat)}
    active |= _still_beating(observed, elsewhere)
    beats |= elsewhere
    if active:
        return _of_ranks(observed, active)
    if observed.supervisor is not None and observed.supervisor.is_alive(observed.now):
        return _of_supervisor(observed, observed.supervisor, list(beats.values()))
    return _of_ended_run(observed)


def _still_beating(observed: _Observed, beats: Mapping[int, Beat]) -> dict[int, Beat]:
    """Return the ranks on another machine that run, according to their heartbeats: their processes are not visible.

    After the journal records the end of the ranks, heartbeats no longer count: they were written before. The order of
    the journal decides, because the clocks of two machines may differ. Until then ranks of a supervisor with a valid
    lease run, or hang.
    """
    last = observed.last_event
    ended = last is not None and last.kind in _RANKS_ENDED
    may_restart = last is not None and last.kind in ("done", "stop")  # by hand: journaled once it trains
    return {
        rank: beat
        for rank, beat in beats.items()
        if not observed.is_lost(beat)
        and (observed.is_watched or observed.seconds_until_hung(beat) > 0)
        and (not ended or (may_restart and beat.phase == "starting"))
    }


def _of_ranks(observed: _Observed, active: Mapping[int, Beat]) -> RunState:
    main = active.get(0) or next(iter(active.values()))
    late = {rank: beat for rank, beat in active.items() if observed.seconds_until_hung(beat) < 0}
    if not late:
        return RunState(_BY_PHASE.get(main.phase, "running"), beat=main)
    rank, beat = min(late.items(), key=lambda item: item[1].time)
    silent = duration(observed.now - beat.time)
    return RunState("hung?", f"rank {rank}: no heartbeat for {silent}, in step {beat.step:,} ({beat.phase})", main)


def _of_supervisor(observed: _Observed, supervisor: SupervisorRecord, beats: Sequence[Beat]) -> RunState:
    """Return the state of a run that has a supervisor but no rank."""
    now, last = observed.now, observed.last_event
    if supervisor.state == "waiting":
        start = supervisor.next_start
        return RunState("waiting", next_start=start, overdue=start is not None and now > start + _OVERDUE_SECONDS)
    if last is not None and last.kind in _FINAL:  # the supervisor is about to exit, too
        has_ended_well = last.kind in ("done", "stop")
        return RunState(_FINAL[last.kind], f"supervised by {supervisor.describe(now)}" if has_ended_well else None)
    if last is None or last.kind == "launch":
        since = supervisor.started if last is None else last.time
        is_hung = now - since > longest_silence(observed.settings, False, None)
        return (
            RunState("hung?", f"no rank has started for {duration(now - since)}") if is_hung else RunState("starting")
        )
    newest = max([last.time, *(beat.time for beat in beats)])
    is_hung = now - newest > observed.settings.stop_seconds + _OVERDUE_SECONDS
    return RunState("hung?", f"no rank has run for {duration(now - newest)}") if is_hung else RunState("waiting")


def _of_ended_run(observed: _Observed) -> RunState:
    """Return the state of a run without any process, from its last event and from the supervisor's record."""
    supervisor, last = observed.supervisor, observed.last_event
    if last is not None and last.kind in _FINAL:
        was_killed = supervisor is not None and supervisor.state != "ended"
        if last.kind == "stop" and was_killed and _was_supervised(observed.events):
            return RunState("dead", "the supervisor was killed; the ranks have saved and exited")
        return RunState(_FINAL[last.kind], last.text if last.kind in ("mistake", "gave_up") else None)
    is_newer = last is None or _is_older(last, observed.run_dir / RECORD)
    if supervisor is not None and is_newer and supervisor.state == "ended":
        if supervisor.code is not None and supervisor.code in _BY_CODE:
            return RunState(_BY_CODE[supervisor.code])
        if last is None or last.kind == "launch":  # stopped before there was anything to save
            return RunState("stopped")
        return RunState("dead", "it exited without saving its last state")
    if supervisor is not None and (text := _not_seen(observed, supervisor)) is not None:
        return RunState("dead", text)
    explains = last is not None and (last.kind in ("crash", "hang") or _is_failed_end(last))
    return RunState("dead", last.text if last is not None and explains else None)


def _not_seen(observed: _Observed, supervisor: SupervisorRecord) -> str | None:
    """Return since when a supervisor on another host has not been seen; None if the run has a later event."""
    last = observed.last_event
    if supervisor.is_here or supervisor.renewed is None or not supervisor.has_expired(observed.now):
        return None
    if last is not None and last.time > supervisor.renewed + LEASE_SECONDS:
        return None
    seen = clock(supervisor.renewed)
    return f"not seen since {seen}: the supervisor on {supervisor.host} is gone, or that machine"


def _is_failed_end(event: Event) -> bool:
    """Return whether the ranks recorded with this event that they ended without success."""
    return event.facts.get("ended") is True


def _is_older(event: Event, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return event.time <= file.stat().st_mtime + _SAME_TIME_SECONDS
    return False


def _was_supervised(events: Sequence[Event]) -> bool:
    """Return whether a supervisor started the ranks that wrote the last event."""
    starts = itertools.takewhile(lambda event: event.kind in ("launch", "start"), reversed(events[:-1]))
    return any(event.kind == "launch" for event in starts)


def _read_beats(run_dir: Path) -> dict[int, Beat]:
    """Return the newest heartbeat of each rank, including ranks whose process has ended."""
    found = itertools.takewhile(lambda beat: beat is not None, (read_beat(run_dir, rank) for rank in itertools.count()))
    return {rank: beat for rank, beat in enumerate(found) if beat is not None}


def _with_file_time(run_dir: Path, rank: int, beat: Beat) -> Beat:
    """Use the modification time of the file if it is newer: the clock of the rank's machine may be slow."""
    written = beat_mtime(run_dir, rank)
    return beat if written is None else replace(beat, time=max(beat.time, written))


def _is_beating(run_dir: Path, rank: int, beat: Beat) -> bool:
    """Return whether the rank's process runs on this machine.

    A later process with the same PID does not count, nor a rank of the run of which ``run_dir`` is a copy.
    """
    exists = is_running(beat.pid, beat.start) if beat.start else was_running_by_clock(beat.pid, beat.time)
    return exists and not is_of_original(run_dir, rank, beat.pid)


def _host(supervisor: SupervisorRecord | None, lock: Path) -> str | None:
    """Return the host of the ranks, from the lock of the checkpoints or the supervisor's record; None if not known."""
    return last_host(lock) or (supervisor.host if supervisor is not None else None)
