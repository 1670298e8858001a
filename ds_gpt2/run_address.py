"""Where a run is: a directory of a machine. Written beside what must not be shared by a run and its copy.

A copied run has the name, the settings and the files of the original: by what was written, it knows that it is not the
one that a backup location or a tracker's ids belong to.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.run_location import is_run_dir


@dataclass(frozen=True)
class RunAddress:
    """The directory of a run, with all links resolved, and the machine's name."""

    run_dir: str
    host: str

    def __str__(self) -> str:
        return f"the run in {self.run_dir} on {self.host}"

    def is_in_use(self) -> bool:
        """Whether there is a run, as far as this machine can tell: of another machine's it knows nothing."""
        return self.host == platform.node() and is_run_dir(Path(self.run_dir))

    def to_dict(self) -> dict[str, str]:
        """Fields fit for JSON."""
        return asdict(self)


def address_of(run_dir: Path) -> RunAddress:
    """The address of the run in ``run_dir``, on this machine."""
    return RunAddress(str(run_dir.resolve()), platform.node())


def read_address(fields: Any) -> RunAddress | None:
    """The address in ``fields``, as ``to_dict`` gives them; None if they are something else."""
    try:
        return RunAddress(str(fields["run_dir"]), str(fields["host"]))
    except (KeyError, TypeError, IndexError):
        return None
