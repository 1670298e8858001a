"""A request to stop: a signal, a file or a moved directory, and the loop ends with everything saved."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

from ds_gpt2.common.files import is_real_directory
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_start import is_running, start_of

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: what Slurm sends before its time limit
STOP_FILE = "STOP"  # in the run's directory

_SUPERVISOR = "DS_GPT2_SUPERVISOR"  # environment: its process id, and when that began


class StopRequest:
    """Remembers that somebody asked; asking twice changes nothing."""

    def __init__(self, run_dir: OpenDirectory | None = None, checkpoints: OpenDirectory | None = None) -> None:
        """
        Args:
            run_dir: a file ``STOP`` in it is a request too, and so are its move or deletion and the supervisor's death;
                None on ranks that do not watch.
            checkpoints: the directory of the run's checkpoints, whose move is a request.
        """
        self.supervisor_lost = False  # the supervisor was found dead
        self._asked = False
        self._run_dir, self._checkpoints = run_dir, checkpoints
        self._supervisor = _supervisor() if run_dir is not None else None

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor has started this process."""
        return self._supervisor is not None

    @property
    def signalled(self) -> bool:
        """Whether this process was sent a signal to stop."""
        return self._asked

    @property
    def requested(self) -> bool:
        run_dir = self._run_dir
        if self._asked or run_dir is None:
            return self._asked
        return os.path.lexists(run_dir.path / STOP_FILE) or self.reason is not None or self._look_for_supervisor()

    @property
    def reason(self) -> str | None:
        """Why the run cannot continue in place; None if it can, and on ranks that do not watch."""
        for directory in (self._run_dir, self._checkpoints):
            if directory is not None and directory.is_moved:
                return f"{directory.opened_as} was moved to {directory.path} while the run trained"
        if self._run_dir is not None and self._run_dir.is_deleted:
            return f"{self._run_dir.path} was deleted while the run trained"
        return None

    def listen(self) -> None:
        """From now on the signals only set the flag."""
        for number in SIGNALS:
            signal.signal(number, self._request)

    def clear(self) -> None:
        """Delete the file: the request has been met, or was made before this run was started."""
        if self._run_dir is not None:
            file = self._run_dir.path / STOP_FILE
            try:
                file.rmdir() if is_real_directory(file) else file.unlink(missing_ok=True)
            except OSError as error:
                log.warning(
                    f"{file} cannot be removed ({error.strerror}): the next start stops again while it is there"
                )

    def _look_for_supervisor(self) -> bool:
        """Without it the run would not be restarted and a hang not be noticed: better to end now, all saved."""
        self.supervisor_lost = self._supervisor is not None and not is_running(*self._supervisor)
        return self.supervisor_lost

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def supervisor_environment() -> dict[str, str]:
    """The environment that makes a run stop when this process is gone."""
    return {_SUPERVISOR: f"{os.getpid()} {start_of(os.getpid())}"}


def _supervisor() -> tuple[int, str] | None:
    pid, _, start = os.environ.get(_SUPERVISOR, "").partition(" ")
    return (int(pid), start) if start else None


def restore_default_handlers() -> None:
    """Until there is something to save, the signals end the process at once, with no traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
