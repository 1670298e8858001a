"""``supervisor.json`` in a run's directory: who watches over the run, and the processes that it has started."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import Field, TypeAdapter

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import replace_file
from ds_gpt2.common.process_start import is_running
from ds_gpt2.run_dir.journal import Time

RECORD = "supervisor.json"
SUPERVISOR_DIR = "supervisor"  # beside it: the supervisor's lock

_Pid = Annotated[int, Field(gt=0, lt=2**31)]
_SAME_START_SECONDS = 2.0  # by the clock of an earlier version


@dataclass(frozen=True)
class SupervisorRecord:
    """What a supervisor says of itself."""

    pid: _Pid
    started: Time  # of the process, seconds since 1970
    host: str
    state: Literal["running", "waiting", "ended"]
    ranks: int
    group: _Pid | None = None  # process group of DeepSpeed's launcher and the ranks; None while there is none
    next_start: Time | None = None  # seconds since 1970, while it waits
    code: int | None = None  # how it ended
    start: str = ""  # of the process, see ``process_start``; earlier versions did not record it

    def write(self, run_dir: Path) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        replace_file(run_dir / RECORD, json.dumps(asdict(self)))

    @property
    def is_alive(self) -> bool:
        """Whether that supervisor still lives; one on another machine is taken at its word."""
        if self.state == "ended":
            return False
        return self.host != socket.gethostname() or self.is_running()

    def is_running(self) -> bool:
        """Whether its process is on this machine."""
        return is_running(self.pid, self.start) if self.start else _lived_by_clock(self.pid, self.started)


_SUPERVISED = TypeAdapter(SupervisorRecord)


def read_supervisor_record(run_dir: Path) -> SupervisorRecord | None:
    """What the run's newest supervisor said; None where there was none, or the file is damaged."""
    try:
        values = safe_json.read(run_dir / RECORD)
        return _SUPERVISED.validate_python(values)
    except (OSError, ValueError):
        return None


def _lived_by_clock(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _SAME_START_SECONDS and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
