"""The objects that the parts of a run's supervisor share, and their periodic checks."""

from __future__ import annotations

from ds_gpt2.common.locks import Lock
from ds_gpt2.config.settings import Settings
from ds_gpt2.supervision.disk_watch import DiskWatch, WriteWatch
from ds_gpt2.supervision.reporter import Reporter
from ds_gpt2.supervision.run_directories import RunDirectories
from ds_gpt2.supervision.stop_signals import StopSignals

POLL_SECONDS = 0.5  # between two checks of the ranks, the alerts and the disks


class TakenOverError(Exception):
    """A supervisor on another host supervises the run now, because the lease of this one had ended."""


class Context:
    """The settings, directories, reports and stop signals of a supervised run."""

    def __init__(self, settings: Settings, stop: StopSignals, ranks: int, lock: Lock | None = None) -> None:
        """
        Args:
            lock: of the run's supervisor; None: not checked.
        """
        self.settings = settings
        self.stop = stop
        self.directories = RunDirectories(settings)
        self.reporter = Reporter(settings, self.directories.run, ranks)
        self._lock = lock
        self._disk_watch = DiskWatch(settings)
        self._write_watch = WriteWatch(self.directories.run)

    def poll(self) -> None:
        """Send new alerts and check the disks; to be called every ``POLL_SECONDS``.

        Raises:
            TakenOverError: this supervisor has been replaced by another.
        """
        if self._lock is not None and self._lock.taken_by is not None:
            raise TakenOverError(f"process {self._lock.taken_by} has taken over the run")
        self.reporter.catch_up()
        if (warning := self._disk_watch.check()) is not None:
            self.reporter.report("disk_low", warning)
        if (warning := self._write_watch.check()) is not None:
            self.reporter.report("not_logged", warning)
