"""A request to stop: a signal or a file sets a flag, and the loop ends with everything saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from ds_gpt2.supervised import lives

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: what Slurm sends before its time limit
STOP_FILE = "STOP"  # in the run's directory

_SUPERVISOR = "DS_GPT2_SUPERVISOR"  # environment: its process id, and when that began


class StopRequest:
    """Remembers that somebody asked; asking twice changes nothing."""

    def __init__(self, file: Path | None = None) -> None:
        """
        Args:
            file: its appearance is a request too, and so is the supervisor's death; None on ranks that do not watch.
        """
        self._asked = False
        self._file = file
        self._supervisor = _supervisor() if file is not None else None

    @property
    def requested(self) -> bool:
        return self._asked or (self._file is not None and (self._file.exists() or self._is_alone()))

    def listen(self) -> None:
        """From now on the signals only set the flag, and a file left from before does not count."""
        for number in SIGNALS:
            signal.signal(number, self._request)
        self.clear()

    def clear(self) -> None:
        """Take the file away: the request has been met."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _is_alone(self) -> bool:
        """Nobody would restart the run or notice that it hangs: better to end now, with everything saved."""
        return self._supervisor is not None and not lives(*self._supervisor)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def watched_by(pid: int, started: float) -> dict[str, str]:
    """The environment that makes a run stop when that supervisor is gone."""
    return {_SUPERVISOR: f"{pid} {started}"}


def _supervisor() -> tuple[int, float] | None:
    pid, _, started = os.environ.get(_SUPERVISOR, "").partition(" ")
    return (int(pid), float(started)) if started else None


def die_silently() -> None:
    """Until there is something to save, the signals end the process at once, with no traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
