"""Signals that request the supervisor to stop the run."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ds_gpt2.run_dir.stop_request import SIGNALS


class StopSignals:
    """A context in which Ctrl+C, SIGTERM, SIGUSR1 and a closing terminal only set a flag.

    Afterwards, the signals are ignored to the end of the process: one during the shutdown of Python would change the
    exit code. They are handled as before only if an error ends the context.
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
        has_failed = error[0] is not None
        for number, handler in self._previous.items():
            signal.signal(number, handler if has_failed else signal.SIG_IGN)

    def end_requests(self) -> bool:
        """Make the signals end the process, as in a program that starts; return whether a stop was requested before.

        Call it before this process executes another program, which inherits ignored signals: no request is lost.
        Signals that were ignored before the context are ignored again.
        """
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler == signal.SIG_IGN else signal.SIG_DFL)
        return self.requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
