"""Detect a hang: judge from the ranks' heartbeats, not from their processes, whether the run makes progress."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision.rank_heartbeats import RankHeartbeats

log = logging.getLogger(__name__)

_STEPS = 100  # the number of step times that are remembered
_LONGEST_INTERVAL = 5.0  # seconds between two checks that count: after a suspend of the machine, ranks are not late


@dataclass(frozen=True)
class Hang:
    """A run without progress."""

    rank: int  # the slowest
    step: int
    text: str


def longest_silence(settings: SupervisorSettings, in_step: bool, step_seconds: float | None) -> float:
    """Return the seconds for which a rank may be silent: without a new heartbeat.

    Args:
        in_step: whether the rank trains and its first step, which may compile for minutes, is over.
        step_seconds: the usual time of a step; None if it is not known.
    """
    if not in_step or step_seconds is None:
        return 60 * settings.patience_minutes
    return max(settings.hang_seconds, settings.hang_factor * step_seconds)


class Watchdog:
    """Checks the heartbeats of one launch. Only time in which it checks regularly counts as silence."""

    def __init__(
        self,
        settings: SupervisorSettings,
        heartbeats: RankHeartbeats,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            clock: seconds.
        """
        self._settings = settings
        self._heartbeats = heartbeats
        self._clock = clock
        self._last_check = clock()
        self._now = 0.0  # seconds of watching so far
        self._beats: list[Beat | None] = [None] * ranks
        self._changed = [0.0] * ranks  # time of each rank's newest heartbeat, as ``_now``
        self._is_blind = False
        self._step_start: tuple[int, float] | None = None  # of rank 0: the step, and when it began
        self._step_seconds: deque[float] = deque(maxlen=_STEPS)

    @property
    def newest(self) -> Beat | None:
        """The newest heartbeat of the rank that is furthest; None if there is none."""
        return max((beat for beat in self._beats if beat is not None), key=lambda beat: beat.step, default=None)

    def check(self) -> Hang | None:
        """Read the heartbeats; return the hang that they show, None if there is none."""
        clock = self._clock()
        self._now += min(clock - self._last_check, _LONGEST_INTERVAL)
        self._last_check = clock
        for rank, beat in enumerate(self._heartbeats.read()):
            if beat is not None and beat != self._beats[rank]:
                self._beats[rank], self._changed[rank] = beat, self._now
                self._is_blind = False
        self._time_step(self._beats[0])
        hang = self._hang()
        if hang is not None and self._heartbeats.problem() is not None:
            self._suspend()
            return None
        return hang

    def patience(self, beat: Beat | None) -> float:
        """Return the seconds for which a rank may be silent in the phase of its newest heartbeat."""
        usual = statistics.median(self._step_seconds) if self._step_seconds else None
        in_step = beat is not None and beat.phase == "training" and usual is not None
        return longest_silence(self._settings, in_step, usual)

    def _suspend(self) -> None:
        """Do not judge ranks that cannot write heartbeats; their time starts again when they can."""
        if not self._is_blind:
            log.warning("heartbeats cannot be written: hangs are not detected until this is fixed")
        self._is_blind = True
        self._changed = [self._now] * len(self._changed)

    def _hang(self) -> Hang | None:
        silent = [self._now - changed for changed in self._changed]
        overdue = [rank for rank, beat in enumerate(self._beats) if silent[rank] > self.patience(beat)]
        if not overdue:
            return None
        stopped = self._heartbeats.stopped()  # the others wait for them, and may have been silent for longer
        rank = min(stopped or overdue, key=lambda each: _progress(self._beats[each]))
        beat = self._beats[rank]
        if beat is None:
            return Hang(rank, 0, f"rank {rank} has written no heartbeat for {silent[rank]:.0f} s since its start")
        usual = f", usually {statistics.median(self._step_seconds):.1f} s per step" if self._step_seconds else ""
        state = ", its process is stopped" if rank in stopped else ""
        where = f"in step {beat.step:,} ({beat.phase}{usual}{state})"
        return Hang(rank, beat.step, f"rank {rank} has made no progress for {silent[rank]:.0f} s {where}")

    def _time_step(self, beat: Beat | None) -> None:
        if beat is None or beat.phase != "training":
            self._step_start = None
        elif self._step_start is None:
            self._step_start = beat.step, self._now
        elif beat.step > self._step_start[0]:
            self._step_seconds.append((self._now - self._step_start[1]) / (beat.step - self._step_start[0]))
            self._step_start = beat.step, self._now


def _progress(beat: Beat | None) -> tuple[int, bool]:
    """Return a key that orders ranks by progress: within a step, training comes before evaluation."""
    return (-1, False) if beat is None else (beat.step, beat.phase != "training")
