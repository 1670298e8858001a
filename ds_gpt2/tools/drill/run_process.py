"""One run of the drill as a process: start it, read what it records, interrupt and kill it."""

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

import psutil

from ds_gpt2.checkpoint.catalog import newest_step
from ds_gpt2.common.formatting import HOUR
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import Beat, read_beat
from ds_gpt2.run_dir.journal import Event, Journal, read_journal
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.drill import fault_injection, supervisor_child
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_hosts import RunHosts
from ds_gpt2.tools.drill.small_disk import SmallDisks

_MARK = "DS_GPT2_DRILL"  # environment variable of all processes that a drill starts
_POLL_SECONDS = 0.02
_LONGEST_RUN_SECONDS = 4 * HOUR


class FailedError(Exception):
    """A verification failed; the message is one line."""


@dataclass
class RunProcess:
    """A run under a supervisor that is a separate process."""

    config: Path
    settings: Settings
    layout: RankLayout
    output: Path  # receives what the supervisor and the ranks print
    mark: str  # identifies the processes of the drill
    timeout: float  # seconds for a start, a stop, or a few steps
    hosts: RunHosts = field(default_factory=lambda: RunHosts((), "ssh", Path()))
    started_at: int = field(default=0, init=False)  # position in the journal at the newest start
    _has_small_disk: bool = field(default=False, init=False)  # for the run's directory
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def run_dir(self) -> Path:
        """The run's directory as this process can read it, also if it is a small disk in the run's mount namespace."""
        directory = self.settings.run_dir
        return Path(f"/proc/{self.pid}/root{directory}") if self._has_small_disk and self.alive else directory

    @property
    def checkpoint_dir(self) -> Path:
        return self.settings.checkpoint_dir

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        if self._process is None:
            raise FailedError("the run was not started")
        return self._process.pid

    def start(
        self,
        *overrides: str,
        resume: str = "auto",
        ranks: int | None = None,
        faults: Sequence[Fault] = (),
        disks: SmallDisks | None = None,
    ) -> None:
        """Start the supervisor.

        Args:
            overrides: settings as ``key=value``.
            resume: as ``--resume`` of the trainer.
            ranks: None: as in the layout.
            faults: faults to inject.
            disks: small file systems for the checkpoints or the run's directory.
        """
        disks = disks or SmallDisks()
        words = [str(self.config), self.layout.accelerator, str(ranks or self.layout.ranks), resume]
        words += [str(disks.checkpoints), str(disks.run_dir)]
        command = [*disks.command, sys.executable, str(supervisor_child.SCRIPT), *words, *overrides]
        environment = {**os.environ, **fault_injection.request(faults), _MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        self.started_at = self.journal_position()
        self._has_small_disk = disks.run_dir > 0
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
        """Return the newest heartbeats of the ranks."""
        found = [read_beat(self.run_dir, rank) for rank in range(self.layout.ranks)]
        return [beat for beat in found if beat is not None]

    def done_steps(self) -> int:
        """Return the highest step that a rank has finished; 0 before the first step."""
        return max((beat.step - (beat.phase == "training") for beat in self.beats()), default=0)

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint; -1 if there is none."""
        return newest_step(self.checkpoint_dir)

    def journal_position(self) -> int:
        """Return the current end of the journal, for ``events``."""
        return Journal(self.run_dir).size()

    def events(self, since: int, *kinds: str) -> list[Event]:
        """Return the events of ``kinds`` that the journal has after position ``since``."""
        return [event for event in read_journal(self.run_dir, since) if event.kind in kinds]

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this machine."""
        return self.hosts.local_ranks if self.hosts.hosts else list(range(self.layout.ranks))

    @property
    def group(self) -> int:
        """The process group of DeepSpeed's launcher and the ranks on this machine."""
        record = read_supervisor_record(self.run_dir)
        group = record.group if record is not None else None
        if (group := group or self.hosts.local_group(self.run_dir)) is None:
            raise FailedError("the supervisor has not recorded the processes of the run")
        return group

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank on this machine.

        Raises:
            FailedError: the rank does not run.
        """
        beat = read_beat(self.run_dir, number)
        try:
            if beat is not None:
                return psutil.Process(beat.pid)
        except psutil.NoSuchProcess:
            pass
        raise FailedError(f"rank {number} does not run")

    def launchers(self) -> list[psutil.Process]:
        """Return the processes of DeepSpeed's launcher: those of the group that are not ranks."""
        members, ranks = rank_processes.members(self.group), rank_processes.ranks_of(self.group)
        return [process for process in members if process not in ranks]

    def wait_for(self, what: str, happened: Callable[[], object], seconds: float | None = None) -> float:
        """Wait until ``happened`` returns a true value; return the time of that, in seconds since 1970.

        Args:
            what: describes the event, for the error.
            seconds: time limit; None: the timeout of this run.

        Raises:
            FailedError: it does not happen in time, or the run ends first.
        """
        limit = self.timeout if seconds is None else seconds
        deadline = time.monotonic() + limit
        while True:
            ended = not self.alive  # checked first: what the run does before its end counts
            if happened():
                return time.time()
            if ended:
                code = self._process.poll() if self._process is not None else None
                raise FailedError(f"{what}: the run ended before, exit code {code}")
            if time.monotonic() > deadline:
                raise FailedError(f"{what}: not within {limit:.0f} s")
            time.sleep(_POLL_SECONDS)

    def wait_end(self, seconds: float | None = None) -> int:
        """Wait for the supervisor to end and return its exit code.

        Raises:
            FailedError: it does not end in time.
        """
        assert self._process is not None
        try:
            return self._process.wait(self.timeout if seconds is None else seconds)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"the run did not end within {error.timeout:.0f} s") from None

    def wait_done(self) -> None:
        """Wait for the run to finish its last step.

        Raises:
            FailedError: the run ends earlier or with an error.
        """
        if (code := self.wait_end(_LONGEST_RUN_SECONDS)) != exit_codes.DONE:
            raise FailedError(f"the run ended with exit code {code}")

    def interrupt(self) -> None:
        """Send SIGINT to the supervisor, like Ctrl+C."""
        os.kill(self.pid, signal.SIGINT)

    def kill_supervisor(self) -> None:
        """Send SIGKILL to the supervisor and wait for its end."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_end(10)

    def kill_everything(self) -> None:
        """Send SIGKILL to the supervisor, the launcher and the ranks, on all hosts."""
        group = self.group
        with self.hosts.connected(self.hosts.others) as links:
            os.kill(self.pid, signal.SIGKILL)
            rank_processes.kill(group)
            for link in links.values():
                self.hosts.kill_on(link, self.run_dir)
        self.wait_end(10)


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes that the drill ``mark`` has started, in all sessions."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(mark: str) -> list[str]:
    """Kill the processes that the drill ``mark`` has started; return their command lines."""
    commands: list[str] = []
    while processes := marked(mark):  # repeated: a process may have started another meanwhile
        for process in processes:
            with contextlib.suppress(psutil.Error):
                commands.append(" ".join(process.cmdline()))
                process.kill()
        psutil.wait_procs(processes, timeout=5)
    return commands
