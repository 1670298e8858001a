"""Signals that request the supervisor to stop the run."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ds_gpt2.run_dir.stop_request import SIGNALS


class StopSignals:
    """A context in which Ctrl+C, SIGTERM, SIGUSR1 and a closing terminal only set a flag.

    After a request, the signals stay ignored: a further one during the shutdown of Python would change the exit code.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}  # signal -> its handler before, as signal.signal returned it

    def __enter__(self) -> StopSignals:
        signals = list(SIGNALS)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it, so that the run outlives the terminal
            signals.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._request) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
