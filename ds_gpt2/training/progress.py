"""Heartbeats and stop requests during long work of a rank, in which ranks cannot communicate."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ds_gpt2.run_dir.heartbeat import Heartbeat
from ds_gpt2.run_dir.stop_request import StopRequest
from ds_gpt2.training.hooks import Interrupted

_SECONDS = 0.2  # between two checks for a stop request


class Progress:
    """Called often during an evaluation, independently on each rank: ranks may be at different points of it."""

    def __init__(self, heartbeat: Heartbeat, stop: StopRequest, stop_file: Path) -> None:
        self._heartbeat, self._stop, self._stop_file = heartbeat, stop, stop_file
        self._next = 0.0

    def __call__(self) -> None:
        """Beat, and check for a stop request; most calls return at once.

        Raises:
            Interrupted: a stop is requested.
        """
        if self._stop.signalled:
            raise Interrupted
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SECONDS
        self._heartbeat.beat()
        if self._stop.requested or is_stopped(self._stop, self._stop_file):
            raise Interrupted


def is_stopped(stop: StopRequest, file: Path) -> bool:
    """Return whether this rank sees a stop request."""
    return stop.signalled or os.path.lexists(file)  # unlike Path.exists, it does not raise if the disk fails
