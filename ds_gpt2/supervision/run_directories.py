"""The directories of a supervised run, which are followed when they are moved."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ds_gpt2.checkpoint.catalog import newest_step
from ds_gpt2.common.files import write_problem
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import PROJECT_DIR, Settings
from ds_gpt2.run_dir import stop_request


class RunDirectories:
    """The directories of the run and its checkpoints, and the project's."""

    def __init__(self, settings: Settings) -> None:
        self.run = OpenDirectory(settings.run_dir)
        self.checkpoints = OpenDirectory(settings.checkpoint_dir)
        self.project = OpenDirectory(PROJECT_DIR)
        self._tensorboard_dir = settings.tensorboard_dir
        self._saved_step = -1

    @property
    def run_dir(self) -> Path:
        """Where the run's directory is now."""
        return self.run.path

    def run_was_relocated(self) -> bool:
        """Return whether the run's directory was moved or deleted."""
        return self.run.is_moved or self.run.is_deleted

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint; -1 if there is none. If they cannot be read, the step before."""
        with contextlib.suppress(OSError):
            self._saved_step = newest_step(self.checkpoints.path)
        return self._saved_step

    def take_stop_file(self) -> bool:
        """Delete the file ``STOP``; return whether there was one. While ranks run, they delete it."""
        return stop_request.take_stop_file(self.run_dir)

    def write_problem(self) -> str | None:
        """Return which directory of logs cannot be written, and why; None if all can.

        The directory of checkpoints may be full, because a save deletes older checkpoints.
        """
        tensorboard = [self._tensorboard_dir] if os.path.isdir(self._tensorboard_dir) else []
        for directory in (self.run_dir, *tensorboard):
            if (problem := write_problem(directory)) is not None:
                return f"{directory} cannot be written ({problem})"
        return None
