"""The heartbeats of the ranks of one launch on this machine, for the watchdog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import psutil

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.run_dir.heartbeat import Beat, beat_problem, read_beat


class RankHeartbeats(Protocol):
    """The heartbeats of all ranks of one launch, on one machine or on several."""

    def read(self) -> list[Beat | None]:
        """Return the newest heartbeat of each rank; None for a rank without one since the launch."""

    def stopped(self) -> set[int]:
        """Return the ranks whose process is stopped (SIGSTOP)."""

    def problem(self) -> str | None:
        """Return why ranks cannot write heartbeats; None if they can."""


class LocalHeartbeats:
    """The heartbeats of ranks on this machine, read from their files."""

    def __init__(self, run_dir: OpenDirectory, ranks: Sequence[int]) -> None:
        """Call this before the ranks are launched or soon after.

        Args:
            ranks: their numbers.
        """
        self._run_dir = run_dir
        self._ranks = ranks
        # Heartbeats of an earlier launch that could not be deleted are ignored.
        self._old = {rank: read_beat(run_dir.path, rank) for rank in ranks}

    def read(self) -> list[Beat | None]:
        """Return the newest heartbeat of each rank; None for a rank without one since the launch.

        Ranks of an earlier launch may still run on a host that is lost: their heartbeats are ignored.
        """
        found = {rank: read_beat(self._run_dir.path, rank) for rank in self._ranks}
        return [
            None if beat == self._old[rank] or (beat is not None and beat.is_of_other_host) else beat
            for rank, beat in found.items()
        ]

    def stopped(self) -> set[int]:
        """Return the ranks whose process is stopped (SIGSTOP)."""
        return {
            rank
            for rank, beat in zip(self._ranks, self.read(), strict=True)
            if beat is not None and _is_stopped(beat.pid)
        }

    def problem(self) -> str | None:
        """Return why ranks cannot write heartbeats; None if they can."""
        return beat_problem(self._run_dir.path)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
