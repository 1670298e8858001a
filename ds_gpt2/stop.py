"""A request to stop: a signal or a file sets a flag, and the loop ends with everything saved."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: what Slurm sends before its time limit
STOP_FILE = "STOP"  # in the run's directory


class StopRequest:
    """Remembers that somebody asked; asking twice changes nothing."""

    def __init__(self, file: Path | None = None) -> None:
        """
        Args:
            file: its appearance is a request too; None on ranks that do not watch for one.
        """
        self._asked = False
        self._file = file

    @property
    def requested(self) -> bool:
        return self._asked or (self._file is not None and self._file.exists())

    def listen(self) -> None:
        """From now on the signals only set the flag, and a file left from before does not count."""
        for number in SIGNALS:
            signal.signal(number, self._request)
        self.clear()

    def clear(self) -> None:
        """Take the file away: the request has been met."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def die_silently() -> None:
    """Until there is something to save, the signals end the process at once, with no traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
