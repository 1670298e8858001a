"""A sign of life of every rank: what it is at, told by itself, so that a watchdog can see progress."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ds_gpt2.common.files import no_links, open_for_writing, read_small, write_problem
from ds_gpt2.common.process_start import start_of
from ds_gpt2.common.safe_json import LARGEST, is_time

Phase = Literal["starting", "training", "evaluating", "saving", "finishing"]

_DIRECTORY = "heartbeat"  # in the run's directory, one small file a rank
_stacks: list[BinaryIO] = []  # faulthandler needs the file to stay open
_SIZE = 160  # bytes of a beat: always the same place of the file, so that a full disk does not stop it


@dataclass(frozen=True)
class Beat:
    """The newest sign of life of a rank."""

    count: int  # beats of this process so far: it changes with every one
    time: float  # seconds since 1970
    pid: int
    step: int  # the newest one begun
    batch: int  # of the data, see TrainState.batch
    phase: str
    start: str = ""  # of the process, see ``process_start``; earlier versions did not say it


class Heartbeat:
    """One rank's. A beat is one write of 160 bytes into a file that is open already: some microseconds."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._count = 0
        self._step = self._batch = 0
        self._phase: Phase = "starting"
        self._file: int | None = None
        self._start = start_of(os.getpid())
        with contextlib.suppress(OSError):  # a run is worth more than its watchdog, which will say what it misses
            file = _file(run_dir, rank)
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = no_links(str(file), os.O_WRONLY | os.O_CREAT)
        self.beat()

    def enter(self, phase: Phase) -> None:
        """``phase`` begins here."""
        self._phase = phase
        self.beat()

    def begin_step(self, step: int, batch: int) -> None:
        """Training of ``step`` with ``batch`` of the data begins here."""
        self._step, self._batch = step, batch
        self.enter("training")

    def beat(self) -> None:
        """There is progress within the phase."""
        self._count += 1
        if self._file is None:
            return
        now, pid = f"{time.time():.3f}", os.getpid()
        line = f"{self._count} {now} {pid} {self._step} {self._batch} {self._phase} {self._start}"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(_SIZE - 1).encode() + b"\n", 0)


def enable_stack_dumps(run_dir: Path, rank: int) -> None:
    """From here on SIGUSR2 makes this process write down what each of its threads is doing; so does a fault in C."""
    try:
        file = open_for_writing(stacks_file(run_dir, rank), "wb")
    except OSError:
        return
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR2, file, all_threads=True)
    _stacks.append(file)


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Where ``rank`` writes down its stacks."""
    return _file(run_dir, rank).with_suffix(".stacks")


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """The newest beat of ``rank``; None where there is none that can be read."""
    try:
        count, when, pid, step, batch, phase, *start = read_small(_file(run_dir, rank)).decode("ascii").split()
        beat = Beat(int(count), float(when), int(pid), int(step), int(batch), phase, *start[:1])
        return beat if is_time(beat.time) and 0 < beat.pid < 2**31 and 0 <= beat.step < LARGEST else None
    except (OSError, ValueError):
        return None


def beat_mtime(run_dir: Path, rank: int) -> float | None:
    """When the file system says that ``rank`` gave its newest beat, in seconds since 1970; None if there is none."""
    try:
        return _file(run_dir, rank).stat().st_mtime
    except OSError:
        return None


def beat_problem(run_dir: Path) -> str | None:
    """Why ranks cannot write heartbeats; None if they can."""
    return write_problem(run_dir / _DIRECTORY)


def clear_heartbeats(run_dir: Path) -> None:
    """Nobody beats now: what is there is of processes that are gone."""
    with contextlib.suppress(OSError):
        for file in (run_dir / _DIRECTORY).iterdir():
            file.unlink(missing_ok=True)


def _file(run_dir: Path, rank: int) -> Path:
    return run_dir / _DIRECTORY / f"rank_{rank:05d}"
