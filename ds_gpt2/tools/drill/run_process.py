"""One run of the drill, from outside: what it shows of itself, and what can be done to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from ds_gpt2.checkpoint.catalog import newest_step
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import Beat, read_beat
from ds_gpt2.run_dir.journal import Event, Journal, read_journal
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.drill import fault_injection, supervisor_child
from ds_gpt2.tools.drill.fault_injection import Fault

_MARK = "DS_GPT2_DRILL"  # environment of everything that a drill starts
_LOOK_SECONDS = 0.02
_LONGEST_RUN_SECONDS = 4 * 3600.0


class FailedError(Exception):
    """Something that must hold does not; the message is one line."""


@dataclass
class Actor:
    """A run, its supervisor a process of its own."""

    config: Path
    settings: Settings
    place: RankLayout
    output: Path  # what the supervisor and the ranks print
    mark: str  # of the drill
    patience: float  # seconds for a start, a stop, or a few steps
    started_at: int = field(default=0, init=False)  # where the journal of the newest supervisor begins
    _has_own_disk: bool = field(default=False, init=False)  # of the run's directory
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def run_dir(self) -> Path:
        """Where this process can read it, also while the run has a file system of its own there."""
        directory = self.settings.run_dir
        return Path(f"/proc/{self.pid}/root{directory}") if self._has_own_disk and self.alive else directory

    @property
    def checkpoint_dir(self) -> Path:
        return self.settings.checkpoint_dir

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        if self._process is None:
            raise FailedError("the run was never started")
        return self._process.pid

    def start(
        self,
        *overrides: str,
        resume: str = "auto",
        ranks: int | None = None,
        faults_asked: Sequence[Fault] = (),
        room: int = 0,
        run_room: int = 0,
        within: Sequence[str] = (),
    ) -> None:
        """Start the supervisor.

        Args:
            overrides: settings as ``key=value``.
            room: bytes of a small file system for the checkpoints; 0 for none.
            run_room: bytes of one for the run's directory.
            within: the command that runs it in a namespace of its own.
        """
        words = [str(self.config), self.place.accelerator, str(ranks or self.place.ranks), resume]
        command = [*within, sys.executable, str(supervisor_child.SCRIPT), *words, str(room), str(run_room), *overrides]
        environment = {**os.environ, **fault_injection.request(faults_asked), _MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        self.started_at = self.now()
        self._has_own_disk = run_room > 0
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def beats(self) -> list[Beat]:
        found = [read_beat(self.run_dir, rank) for rank in range(self.place.ranks)]
        return [beat for beat in found if beat is not None]

    def done_steps(self) -> int:
        """Steps that the furthest rank has finished; 0 while it starts."""
        return max((beat.step - (beat.phase == "training") for beat in self.beats()), default=0)

    def saved_step(self) -> int:
        """Of the newest checkpoint; -1 where there is none."""
        return newest_step(self.checkpoint_dir)

    def now(self) -> int:
        """A place in the journal, for ``events``."""
        return Journal(self.run_dir).size()

    def events(self, since: int, *kinds: str) -> list[Event]:
        return [event for event in read_journal(self.run_dir, since) if event.kind in kinds]

    @property
    def group(self) -> int:
        """Process group of DeepSpeed's launcher and the ranks."""
        record = read_supervisor_record(self.run_dir)
        if record is None or record.group is None:
            raise FailedError("the supervisor does not say which processes are the run's")
        return record.group

    def rank(self, number: int) -> psutil.Process:
        beat = read_beat(self.run_dir, number)
        try:
            if beat is not None:
                return psutil.Process(beat.pid)
        except psutil.NoSuchProcess:
            pass
        raise FailedError(f"rank {number} is not there")

    def launchers(self) -> list[psutil.Process]:
        """What of DeepSpeed's is no rank."""
        members, ranks = rank_processes.members(self.group), rank_processes.ranks_of(self.group)
        return [process for process in members if process not in ranks]

    def wait_for(self, what: str, happened: Callable[[], object], seconds: float | None = None) -> float:
        """Until ``happened`` gives anything true; returns the time of that, in seconds since 1970.

        Raises:
            FailedError: it does not happen in time, or the run ends first.
        """
        deadline = time.monotonic() + (self.patience if seconds is None else seconds)
        while True:
            ended = not self.alive  # looked at first: its last words count
            if happened():
                return time.time()
            if ended:
                self._say_that_it_ended(what)
            if time.monotonic() > deadline:
                raise FailedError(f"{what}: not within {self.patience if seconds is None else seconds:.0f} s")
            time.sleep(_LOOK_SECONDS)

    def _say_that_it_ended(self, what: str) -> NoReturn:
        code = self._process.poll() if self._process is not None else None
        raise FailedError(f"{what}: the run ended before, exit code {code}")

    def wait_end(self, seconds: float | None = None) -> int:
        """The supervisor's exit code.

        Raises:
            FailedError: it does not end in time.
        """
        assert self._process is not None
        try:
            return self._process.wait(self.patience if seconds is None else seconds)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"no end within {error.timeout:.0f} s") from None

    def wait_done(self) -> None:
        """
        Raises:
            FailedError: the run does not come to its last step.
        """
        if (code := self.wait_end(_LONGEST_RUN_SECONDS)) != exit_report.DONE:
            raise FailedError(f"the run ended with exit code {code}")

    def interrupt(self) -> None:
        """What Ctrl+C sends."""
        os.kill(self.pid, signal.SIGINT)

    def kill_supervisor(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait_end(10)

    def kill_everything(self) -> None:
        """At once."""
        group = self.group
        os.kill(self.pid, signal.SIGKILL)
        rank_processes.kill(group)
        self.wait_end(10)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that the drill ``mark`` has started, in whatever session they are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(mark: str) -> list[str]:
    """Kill what the drill ``mark`` has started; returns the command lines of what there was."""
    there: list[str] = []
    while processes := marked(mark):  # one may have been starting another
        for process in processes:
            with contextlib.suppress(psutil.Error):
                there.append(" ".join(process.cmdline()))
                process.kill()
        psutil.wait_procs(processes, timeout=5)
    return there
