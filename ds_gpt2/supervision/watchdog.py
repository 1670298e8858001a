"""Is the run getting on? Judged by the ranks' signs of life, not by whether their processes exist."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.heartbeat import Beat, beat_problem, read_beat

log = logging.getLogger(__name__)

_STEPS = 100  # observations of a step's time that are remembered
_LONGEST_LOOK = 5.0  # seconds between two looks that count: who was asleep itself cannot blame the ranks for it


@dataclass(frozen=True)
class Hang:
    """A run that does not get on."""

    rank: int  # the one that is behind the others
    step: int
    text: str


def longest_silence(settings: SupervisorSettings, in_step: bool, step_seconds: float | None) -> float:
    """Seconds that a rank may go without a sign of life.

    Args:
        in_step: whether it trains, after its first step, which may compile for minutes.
        step_seconds: the usual duration of a step; None if it is not known.
    """
    if not in_step or step_seconds is None:
        return 60 * settings.patience_minutes
    return max(settings.hang_seconds, settings.hang_factor * step_seconds)


class Watchdog:
    """Looks at the ranks of one start, some times a second or minute; ``patience`` is used up only while looking."""

    def __init__(
        self,
        settings: SupervisorSettings,
        run_dir: OpenDirectory,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            clock: seconds.
        """
        self._settings = settings
        self._run_dir = run_dir
        self._clock = clock
        self._looked = clock()
        self._now = 0.0  # seconds spent looking
        # Of an earlier start: where they cannot be deleted, they are not taken for this one's.
        self._old = [read_beat(run_dir.path, rank) for rank in range(ranks)]
        self._beats: list[Beat | None] = [None] * ranks
        self._changed = [0.0] * ranks  # when each was last seen to move
        self._blind = False
        self._step_began: tuple[int, float] | None = None  # of rank 0
        self._step_seconds: deque[float] = deque(maxlen=_STEPS)

    @property
    def newest(self) -> Beat | None:
        """The newest sign of life of the rank that is furthest."""
        return max((beat for beat in self._beats if beat is not None), key=lambda beat: beat.step, default=None)

    @property
    def has_trained(self) -> bool:
        """Whether a step has been seen to end."""
        return bool(self._step_seconds)

    def look(self) -> Hang | None:
        """What is wrong now; None if nothing is."""
        clock = self._clock()
        self._now += min(clock - self._looked, _LONGEST_LOOK)
        self._looked = clock
        for rank in range(len(self._beats)):
            beat = read_beat(self._run_dir.path, rank)
            if beat is not None and beat != self._beats[rank] and beat != self._old[rank]:
                self._beats[rank], self._changed[rank] = beat, self._now
                self._blind = False
        self._time_step(self._beats[0])
        hang = self._hang()
        if hang is not None and beat_problem(self._run_dir.path) is not None:
            self._note_blindness()
            return None
        return hang

    def _note_blindness(self) -> None:
        """Do not judge ranks that cannot write heartbeats; their patience starts again when they can."""
        if not self._blind:
            log.warning("the ranks' heartbeats cannot be written: hangs are not noticed meanwhile")
        self._blind = True
        self._changed = [self._now] * len(self._changed)

    def patience(self, beat: Beat | None) -> float:
        """Seconds that a rank may go without a sign of life in the phase that it is in."""
        usual = statistics.median(self._step_seconds) if self._step_seconds else None
        in_step = beat is not None and beat.phase == "training" and usual is not None
        return longest_silence(self._settings, in_step, usual)

    def _hang(self) -> Hang | None:
        silent = [self._now - changed for changed in self._changed]
        overdue = [rank for rank, beat in enumerate(self._beats) if silent[rank] > self.patience(beat)]
        if not overdue:
            return None
        rank = min(overdue, key=lambda each: (not _is_stopped(self._beats[each]), _place(self._beats[each])))
        beat = self._beats[rank]
        if beat is None:
            return Hang(rank, 0, f"rank {rank} has given no sign of life for {silent[rank]:.0f} s since the start")
        usual = f", usually {statistics.median(self._step_seconds):.1f} s a step" if self._step_seconds else ""
        state = ", its process is stopped" if _is_stopped(beat) else ""
        text = f"rank {rank} has not moved for {silent[rank]:.0f} s in step {beat.step} ({beat.phase}{usual}{state})"
        return Hang(rank, beat.step, text)

    def _time_step(self, beat: Beat | None) -> None:
        if beat is None or beat.phase != "training":
            self._step_began = None
        elif self._step_began is None:
            self._step_began = beat.step, self._now
        elif beat.step > self._step_began[0]:
            self._step_seconds.append((self._now - self._step_began[1]) / (beat.step - self._step_began[0]))
            self._step_began = beat.step, self._now


def _place(beat: Beat | None) -> tuple[int, bool]:
    """How far a rank is: one that still trains a step is behind one that evaluates it."""
    return (-1, False) if beat is None else (beat.step, beat.phase != "training")


def _is_stopped(beat: Beat | None) -> bool:
    try:
        return beat is not None and psutil.Process(beat.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
