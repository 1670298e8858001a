"""Requests to stop the training: a signal, a file ``STOP``, or a moved directory. The loop saves and ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from ds_gpt2.common.files import is_real_directory
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import is_running, start_of

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends SIGUSR1 before the time limit
CONNECTION_LOST = signal.SIGHUP  # from an agent that has lost the supervisor on another machine; SIGTERM follows
STOP_FILE = "STOP"  # in the run's directory

_SUPERVISOR = "DS_GPT2_SUPERVISOR"  # environment variable: the supervisor's process id and start time


class StopRequest:
    """Whether the training should stop. Further requests after the first have no effect."""

    def __init__(self, run_dir: OpenDirectory | None = None, checkpoints: OpenDirectory | None = None) -> None:
        """Check for requests in the given directories; signals count after ``listen``.

        Args:
            run_dir: the run's directory. A file ``STOP`` in it, its move or deletion, and the death of the supervisor
                are requests. None on ranks that only check signals.
            checkpoints: the directory of the run's checkpoints. Its move is a request.
        """
        self.supervisor_lost = False  # the supervisor has died
        self.connection_lost = False  # the supervisor, on another machine, does not reach this process any more
        self._is_signalled = False
        self._run_dir, self._checkpoints = run_dir, checkpoints
        self._supervisor = supervisor_of(os.environ) if run_dir is not None else None

    @property
    def is_supervised(self) -> bool:
        """Whether this process was started by a supervisor."""
        return self._supervisor is not None

    @property
    def signalled(self) -> bool:
        """Whether this process has received a signal to stop."""
        return self._is_signalled

    @property
    def requested(self) -> bool:
        """Whether a stop was requested, in any form."""
        run_dir = self._run_dir
        if self._is_signalled or run_dir is None:
            return self._is_signalled
        return os.path.lexists(run_dir.path / STOP_FILE) or self.reason is not None or self._check_supervisor_lost()

    @property
    def reason(self) -> str | None:
        """Why the run cannot continue here: a directory was moved or deleted. None if it can continue or is unknown."""
        for directory in (self._run_dir, self._checkpoints):
            if directory is not None and directory.is_moved:
                return f"{directory.opened_as} was moved to {directory.path} while the run trained"
        if self._run_dir is not None and self._run_dir.is_deleted:
            return f"{self._run_dir.path} was deleted while the run trained"
        return None

    @property
    def cause(self) -> str:
        """Why the run has stopped, to follow "stopped" in a sentence."""
        if self.connection_lost:
            return "because the connection to the supervisor was lost"
        if self.supervisor_lost:
            return "because the supervisor is gone"
        if not self._is_signalled and self.reason is not None:
            return "because a directory of the run was moved or deleted"
        return "on request"

    def listen(self) -> None:
        """Install signal handlers: from now on the signals are requests to stop."""
        for number in SIGNALS:
            signal.signal(number, self._request)
        if is_supervised():
            signal.signal(CONNECTION_LOST, self._request)

    def clear(self) -> None:
        """Delete the file ``STOP``: the request is fulfilled, or was made before this start."""
        if self._run_dir is not None:
            take_stop_file(self._run_dir.path)

    def _check_supervisor_lost(self) -> bool:
        """Return whether the supervisor has died.

        Without it the run would not be restarted and a hang would not be detected, so the run saves and ends.
        """
        self.supervisor_lost = self._supervisor is not None and not is_running(*self._supervisor)
        return self.supervisor_lost

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
        self.connection_lost |= number == CONNECTION_LOST


def take_stop_file(run_dir: Path) -> bool:
    """Delete the file, or the empty directory, ``STOP``; return whether there was one. A failure is logged."""
    file = run_dir / STOP_FILE
    if not os.path.lexists(file):
        return False
    try:
        file.rmdir() if is_real_directory(file) else file.unlink(missing_ok=True)
    except OSError as error:
        log.warning(f"{file} cannot be removed ({error.strerror}): the next start stops again unless it is deleted")
    return True


def supervisor_environment() -> dict[str, str]:
    """Return the environment variables that make a run stop if this process ends."""
    return {_SUPERVISOR: f"{os.getpid()} {start_of(os.getpid())}"}


def without_supervisor(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` for a process that may outlive its rank, and is not ended with it."""
    return {name: value for name, value in environment.items() if name != _SUPERVISOR}


def is_supervised() -> bool:
    """Return whether this process was started by a supervisor."""
    return supervisor_of(os.environ) is not None


def supervisor_of(environment: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the process id and the start time of the supervisor that has set ``environment``; None without one."""
    pid, _, start = environment.get(_SUPERVISOR, "").partition(" ")
    return (int(pid), start) if start else None


def restore_default_handlers() -> None:
    """Restore the default signal handlers: until there is something to save, a signal ends the process immediately."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
