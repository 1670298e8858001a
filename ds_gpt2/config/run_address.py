"""Where a run is. Stored with its backups and its trackers' ids, so that a copied run does not use the original's.

A copied run has the name, the settings and the files of the original.
"""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.config.run_location import is_run_dir


@dataclass(frozen=True)
class RunAddress:
    """The directory of a run, and the machine that it was seen from."""

    run_dir: str
    host: str

    def __str__(self) -> str:
        return f"the run in {self.run_dir} on {self.host}"

    def is_of(self, run_dir: Path) -> bool:
        """Whether this is the run in ``run_dir``, by any path and from any machine."""
        if self.host == socket.gethostname() and self.run_dir == str(run_dir.resolve()):
            return True
        try:
            return os.path.samefile(self.run_dir, run_dir)
        except OSError:
            return False

    def is_in_use(self) -> bool:
        """Whether there is a run, as far as can be seen from here."""
        try:
            return is_run_dir(Path(self.run_dir))
        except OSError:  # another user's directory
            return False

    def to_dict(self) -> dict[str, str]:
        """Fields fit for JSON."""
        return asdict(self)


def address_of(run_dir: Path) -> RunAddress:
    """The address of the run in ``run_dir``, on this machine."""
    return RunAddress(str(run_dir.resolve()), socket.gethostname())


def read_address(fields: Any) -> RunAddress | None:
    """The address in ``fields``, as ``to_dict`` gives them; None if they are something else."""
    try:
        return RunAddress(str(fields["run_dir"]), str(fields["host"]))
    except (KeyError, TypeError, IndexError):
        return None
