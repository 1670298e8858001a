"""``supervisor.json`` in a run's directory: the run's supervisor and the processes that it has started.

The supervisor renews its lease, see ``lease``: the modification time of the file. It shows other machines whether the
supervisor is running.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import replace_file
from ds_gpt2.common.formatting import duration
from ds_gpt2.common.lease import LEASE_SECONDS
from ds_gpt2.common.open_files import has_original_open
from ds_gpt2.common.process_identity import is_running, was_running_by_clock
from ds_gpt2.run_dir.heartbeat import is_of_original, read_beat
from ds_gpt2.run_dir.journal import Time

RECORD = "supervisor.json"
SUPERVISOR_DIR = "supervisor"  # in the run's directory; contains the supervisor's lock
LOCK = "lock"  # file in that directory, open and locked while the supervisor runs

_Pid = Annotated[int, Field(gt=0, lt=2**31)]


@dataclass(frozen=True)
class AgentRecord:
    """The agent of one host of several."""

    host: str  # as in the hostfile
    pid: _Pid
    start: str  # start time of the process, see ``process_identity``
    group: _Pid | None = None  # process group of the ranks there; None if none were launched


@dataclass(frozen=True)
class SupervisorRecord:
    """The content of ``supervisor.json``, as the supervisor has written it."""

    pid: _Pid
    started: Time  # of the process, seconds since 1970
    host: str
    state: Literal["running", "waiting", "ended"]
    ranks: int
    group: _Pid | None = None  # process group of DeepSpeed's launcher and the ranks; None if they are not running
    next_start: Time | None = None  # seconds since 1970; None unless the supervisor waits before a restart
    code: int | None = None  # exit code; None until it ends
    start: str = ""  # start time of the process, see ``process_identity``; not recorded by earlier versions
    agents: tuple[AgentRecord, ...] = ()  # on several hosts
    renewed: Time | None = None  # when it was last seen, by the clock of the file system; None in earlier versions

    def write(self, run_dir: Path) -> None:
        """Replace ``supervisor.json`` in ``run_dir``.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(run_dir / RECORD, json.dumps(asdict(self)))

    @property
    def is_here(self) -> bool:
        """Whether it is the record of a supervisor on this machine."""
        return self.host == socket.gethostname()

    def is_alive(self, now: float) -> bool:
        """Return whether the supervisor is running. On another machine its lease decides, or ``state`` without one.

        Args:
            now: seconds since 1970; only for a supervisor on another machine.
        """
        if self.state == "ended":
            return False
        return self.is_running() if self.is_here else not self.has_expired(now)

    def has_expired(self, now: float) -> bool:
        """Return whether the lease has ended without an end of the supervisor; False if it has none."""
        return self.state != "ended" and self.renewed is not None and now - self.renewed >= LEASE_SECONDS

    def describe(self, now: float) -> str:
        """Return which process the supervisor is, and when another machine has seen it last.

        Args:
            now: seconds since 1970, by the clock of the file system.
        """
        text = f"process {self.pid} on {self.host}"
        if self.is_here or self.renewed is None:
            return text
        return f"{text}, last seen {duration(now - self.renewed)} ago"

    def is_running(self) -> bool:
        """Return whether its process is running on this machine."""
        return is_running(self.pid, self.start) if self.start else was_running_by_clock(self.pid, self.started)


def renew(run_dir: Path) -> None:
    """Renew the lease of the supervisor that has written the record in ``run_dir``. A full disk does not matter.

    Raises:
        OSError: there is no record, or its disk does not answer.
    """
    os.utime(run_dir / RECORD)


_SUPERVISED = TypeAdapter(SupervisorRecord)


def read_supervisor_record(run_dir: Path) -> SupervisorRecord | None:
    """Return the record of the run's newest supervisor.

    None if there is none, if the file is damaged, or if the run was copied while it was running: the supervisor and the
    ranks are those of the original.
    """
    try:
        values = safe_json.read(run_dir / RECORD)
        record = _SUPERVISED.validate_python(values)
        if record.renewed is not None:
            record = replace(record, renewed=(run_dir / RECORD).stat().st_mtime)
    except (OSError, ValueError):
        return None
    return None if _is_of_another_run(record, run_dir) else record


def _is_of_another_run(record: SupervisorRecord, run_dir: Path) -> bool:
    """Return whether the supervisor, or a rank that it has left, is of the run of which ``run_dir`` is a copy."""
    if not record.is_here:
        return False
    if record.is_running():
        return has_original_open(record.pid, run_dir / SUPERVISOR_DIR / LOCK)
    beat = read_beat(run_dir, 0)
    if beat is None or beat.is_of_other_host:
        return False
    return is_running(beat.pid, beat.start) and is_of_original(run_dir, 0, beat.pid)
