"""A request to stop: Ctrl+C or SIGTERM set a flag, and the loop ends at a step's end with everything saved."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers that somebody asked; asking twice changes nothing."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """From now on SIGINT and SIGTERM only set the flag."""
        for number in SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def die_silently() -> None:
    """Until there is something to save, SIGINT and SIGTERM end the process at once, with no traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
