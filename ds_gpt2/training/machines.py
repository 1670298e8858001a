"""Check that the machines of a run fit each other, if no supervisor has: the code, the data and the directories."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence

from ds_gpt2.common import installation
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.shared_directory import has_marks, mark, not_shared, unmark
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import stop_request

_FULL = (errno.ENOSPC, errno.EDQUOT)


def problem_of(check: Callable[[], None]) -> str | None:
    """Call ``check`` before the process group is open; return its problem, if ``check_machines`` will report it.

    On several machines, a rank that ended with an error which only its machine has would leave the others waiting.

    Raises:
        UserError: ``check`` raises it, and all ranks are on this machine or started by a supervisor.
    """
    try:
        check()
    except UserError as error:
        if not _are_unchecked():
            raise
        return str(error)
    return None


def check_machines(settings: Settings, problem: str | None) -> None:
    """Check that the ranks on all machines have the same code, data and directories. The process group must be open.

    Args:
        problem: what this rank has found before.

    Raises:
        UserError: on every rank, if something differs or any rank has a problem.
    """
    if not _are_unchecked():
        return
    collectives.raise_on_all_ranks(problem if collectives.is_main() else None)
    hosts = collectives.gather_objects(socket.gethostname())
    _check_equal(hosts, collectives.call_on_all_ranks(installation.describe))
    _check_shared(settings, hosts[0])
    host = hosts[collectives.rank()]
    collectives.raise_on_all_ranks(None if problem is None else f"host {host}: {problem}")
    data = collectives.call_on_all_ranks(lambda: open_sources(settings.data))
    _check_equal(hosts, {"the data": data.fingerprint})


def _are_unchecked() -> bool:
    """Return whether the ranks are on several machines, which no supervisor has compared."""
    return collectives.spans_machines() and not stop_request.is_supervised()


def _check_equal(hosts: Sequence[str], mine: dict[str, str]) -> None:
    """Check that ``mine`` is equal on all ranks.

    Raises:
        UserError: on every rank, if a value differs.
    """
    first, *others = collectives.gather_objects(mine)
    for host, other in zip(hosts[1:], others, strict=True):
        for difference in installation.differences(hosts[0], first, host, other):
            raise UserError(f"{difference}: make them equal")


def _check_shared(settings: Settings, main_host: str) -> None:
    """Check that the directories of the run are the same on all machines. Nothing is left in them.

    Raises:
        UserError: on every rank, if they are not, or if rank 0 cannot write to them.
    """
    directories = [str(settings.run_dir), str(settings.checkpoint_dir)]
    nonce = secrets.token_hex(8)
    try:
        name, marked = collectives.broadcast_from_main(lambda: (nonce, _mark(directories, nonce)))
        absent = None
        if collectives.is_first_of_machine() and not collectives.is_main():
            absent = _first_absent(name, marked)
        collectives.raise_on_all_ranks(absent and not_shared(absent, main_host, socket.gethostname()))
    finally:
        if collectives.is_main():
            unmark(directories, nonce)


def _mark(directories: Sequence[str], name: str) -> dict[str, str]:
    """Create a file ``name`` for each directory, except on full disks; return where.

    Raises:
        UserError: a file cannot be created.
    """
    marked: dict[str, str] = {}
    for directory in directories:
        try:
            (marked[directory],) = mark([directory], name)
        except OSError as error:
            if error.errno not in _FULL:
                raise UserError(
                    f"cannot write to {directory}: {reason_of(error)}; check its permissions and its disk"
                ) from None
    return marked


def _first_absent(name: str, marked: Mapping[str, str]) -> str | None:
    """Return the first directory that is not the one that rank 0 has marked with ``name``."""
    missing = has_marks(list(marked.values()), [name])
    return next((directory for directory, absent in zip(marked, missing, strict=True) if absent), None)
