"""Leases: signs of life of a process that other machines can see, for files on a shared disk.

A process id has no meaning on another machine, and a machine that is lost sends no message. A lease is the modification
time of a file: its owner sets it to the present every ``RENEW_SECONDS``. Others take the owner for lost when the time
is older than ``LEASE_SECONDS``. Setting the time needs no free space, and a file server uses its own clock for it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0


class Renewal:
    """Renews a lease in a thread, so that work of any length does not delay it. The thread ends with the process."""

    def __init__(self, renew: Callable[[], None], seconds: float = RENEW_SECONDS) -> None:
        """
        Args:
            renew: called every ``seconds``; an ``OSError`` is ignored, because a server may be away for a moment.
        """
        self._renew = renew
        self._seconds = seconds
        self._has_ended = threading.Event()
        threading.Thread(target=self._run, name="lease", daemon=True).start()

    def close(self) -> None:
        """Renew the lease no more. A call of ``renew`` that has begun may still be in progress."""
        self._has_ended.set()

    def _run(self) -> None:
        while not self._has_ended.wait(self._seconds):
            with contextlib.suppress(OSError):
                self._renew()


def file_time(directory: Path) -> float:
    """Return the present time by the clock of the modification times in ``directory``, in seconds since 1970.

    It is that of a temporary file there; that of this machine if no file can be created.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()
