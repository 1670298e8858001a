"""The address of a run: its directory and host. It distinguishes a copied run from the original.

A copied run has the name, the settings and the files of the original. The address is stored with the backups and the
ids of trackers, so that a copied run does not write to those of the original.
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
    """The directory of a run, and the host on which that directory was accessible."""

    run_dir: str
    host: str

    def __str__(self) -> str:
        return f"the run in {self.run_dir} on {self.host}"

    def is_of(self, run_dir: Path) -> bool:
        """Return whether this is the address of the run in ``run_dir``, under any path and on any host."""
        if self.host == socket.gethostname() and self.run_dir == str(run_dir.resolve()):
            return True
        try:
            return os.path.samefile(self.run_dir, run_dir)
        except OSError:
            return False

    def is_in_use(self) -> bool:
        """Return whether a run is there, as far as this host can determine."""
        try:
            return is_run_dir(Path(self.run_dir))
        except OSError:  # another user's directory
            return False

    def to_dict(self) -> dict[str, str]:
        """Return the fields for JSON."""
        return asdict(self)


def address_of(run_dir: Path) -> RunAddress:
    """Return the address of the run in ``run_dir`` on this host."""
    return RunAddress(str(run_dir.resolve()), socket.gethostname())


def read_address(fields: Any) -> RunAddress | None:
    """Return the address in ``fields``, written by ``to_dict``; None if they have another form."""
    try:
        return RunAddress(str(fields["run_dir"]), str(fields["host"]))
    except (KeyError, TypeError, IndexError):
        return None
