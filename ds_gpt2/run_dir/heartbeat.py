"""Heartbeats: every rank records its progress in a file, which the watchdog reads."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ds_gpt2.common.files import no_links, open_for_writing, read_small, write_problem
from ds_gpt2.common.open_files import has_original_open
from ds_gpt2.common.process_identity import start_of
from ds_gpt2.common.safe_json import LARGEST, is_time

Phase = Literal["starting", "training", "evaluating", "saving", "finishing"]

_DIRECTORY = "heartbeat"  # in the run's directory, one small file per rank
_stacks: list[BinaryIO] = []  # faulthandler needs open files
_HOST_CHARACTERS, _HASH_CHARACTERS = 32, 10
_SIZE = 160  # bytes of a beat: the same bytes are overwritten, so that a full disk does not matter


@dataclass(frozen=True)
class Beat:
    """The newest heartbeat of a rank."""

    count: int  # heartbeats of this process so far
    time: float  # seconds since 1970
    pid: int
    step: int  # the step in progress
    batch: int  # the batch of the data, see TrainState.batch
    phase: str
    start: str = ""  # start time of the process, see ``process_identity``; not recorded by earlier versions
    host: str = ""  # see ``_this_host``; not recorded by earlier versions

    @property
    def is_of_other_host(self) -> bool:
        """Whether it is of a rank on another host: its process id means nothing here. False if unknown."""
        return self.host not in ("", _this_host())


class Heartbeat:
    """Writes the heartbeats of one rank. A heartbeat is one write of 160 bytes to an open file: a few microseconds."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Open the file of ``rank`` and write the first heartbeat. If the file cannot be opened, nothing is written."""
        self._count = 0
        self._step = self._batch = 0
        self._phase: Phase = "starting"
        self._file: int | None = None
        self._start = start_of(os.getpid())
        self._host = _this_host()
        with contextlib.suppress(OSError):  # the run continues; the watchdog reports the missing heartbeats
            file = _file(run_dir, rank)
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = no_links(str(file), os.O_WRONLY | os.O_CREAT)
        self.beat()

    def enter(self, phase: Phase) -> None:
        """Record that ``phase`` begins."""
        self._phase = phase
        self.beat()

    def begin_step(self, step: int, batch: int) -> None:
        """Record that the training step ``step`` begins, with batch number ``batch`` of the data."""
        self._step, self._batch = step, batch
        self.enter("training")

    def beat(self) -> None:
        """Record progress within the phase."""
        self._count += 1
        if self._file is None:
            return
        now, pid = f"{time.time():.3f}", os.getpid()
        line = f"{self._count} {now} {pid} {self._step} {self._batch} {self._phase} {self._start} {self._host}"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(_SIZE - 1).encode() + b"\n", 0)


def enable_stack_dumps(run_dir: Path, rank: int) -> None:
    """Write the stack traces of all threads to a file at SIGUSR2 and at fatal signals such as SIGSEGV."""
    try:
        file = open_for_writing(stacks_file(run_dir, rank), "wb")
    except OSError:
        return
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR2, file, all_threads=True)
    _stacks.append(file)


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Return the file for the stack traces of ``rank``."""
    return _file(run_dir, rank).with_suffix(".stacks")


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """Return the newest heartbeat of ``rank``; None if there is none, or if it is unreadable."""
    try:
        count, when, pid, step, batch, phase, *process = read_small(_file(run_dir, rank)).decode("ascii").split()
        beat = Beat(int(count), float(when), int(pid), int(step), int(batch), phase, *process[:2])
        return beat if is_time(beat.time) and 0 < beat.pid < 2**31 and 0 <= beat.step < LARGEST else None
    except (OSError, ValueError):
        return None


def beat_mtime(run_dir: Path, rank: int) -> float | None:
    """Return when the file of ``rank`` was last modified, in seconds since 1970; None if it does not exist."""
    try:
        return _file(run_dir, rank).stat().st_mtime
    except OSError:
        return None


def is_of_original(run_dir: Path, rank: int, pid: int) -> bool:
    """Return whether ``pid`` is a rank of the run of which ``run_dir`` is a copy: it has the original file open."""
    return has_original_open(pid, _file(run_dir, rank))


def beat_problem(run_dir: Path) -> str | None:
    """Return why ranks cannot write heartbeats; None if they can."""
    return write_problem(run_dir / _DIRECTORY)


def clear_heartbeats(run_dir: Path) -> None:
    """Delete the heartbeats of earlier processes."""
    with contextlib.suppress(OSError):
        for file in (run_dir / _DIRECTORY).iterdir():
            file.unlink(missing_ok=True)


def _this_host() -> str:
    """Return the name of this machine as a word of at most ``_HOST_CHARACTERS``; of a longer name the end is hashed."""
    name = re.sub(r"[^!-~]", "_", socket.gethostname())
    if len(name) <= _HOST_CHARACTERS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARACTERS]
    return f"{name[: _HOST_CHARACTERS - _HASH_CHARACTERS]}{digest}"


def _file(run_dir: Path, rank: int) -> Path:
    return run_dir / _DIRECTORY / f"rank_{rank:05d}"
