"""Refuse a start of a run that has a supervisor: here, or on another machine whose lease has not ended."""

from __future__ import annotations

import math
import shlex

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import duration
from ds_gpt2.common.lease import LEASE_SECONDS, file_time
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.stop_request import STOP_FILE
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord, read_supervisor_record


def check_unsupervised(settings: Settings) -> None:
    """Check that the run has no supervisor. A record without a lease, of an earlier version, does not tell.

    Raises:
        UserError: it has one, or one on another machine was seen less than a minute ago.
    """
    record = read_supervisor_record(settings.run_dir)
    if record is None or not (record.is_here or record.renewed is not None):
        return
    if record.is_alive(now := file_time(settings.run_dir)):
        found = f"run {settings.run.name} is supervised by {record.describe(now)}"
        raise UserError(f"{found}: {how_to_proceed(settings, record, now)}")


def how_to_end(settings: Settings) -> str:
    """Return how the training of a run, which may be on another machine, can be ended."""
    stop = f"touch {shlex.quote(str(settings.run_dir / STOP_FILE))}"
    return f"wait until it ends, or stop it (it saves first): `{stop}`"


def how_to_proceed(settings: Settings, record: SupervisorRecord, now: float) -> str:
    """Return what to do about the supervisor of a run that should be started.

    Args:
        now: seconds since 1970, by the clock of the file system.
    """
    fix = f"{how_to_end(settings)}; a new run needs another run.name"
    if record.is_here or record.renewed is None:
        return fix
    left = math.ceil(min(LEASE_SECONDS, record.renewed + LEASE_SECONDS - now))
    return f"{fix}; if that machine is lost, wait {duration(left)}"
