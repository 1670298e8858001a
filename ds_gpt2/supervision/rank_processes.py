"""Find, stop and kill the processes of one launch on this machine, by their process group."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

from ds_gpt2.run_dir import stop_request


def groups_of(supervisor: tuple[int, str]) -> set[int]:
    """Return the process groups of what a supervisor, or an agent, has launched and what still runs.

    Its processes are recognized by their environment: a launcher that has started no rank yet, too.

    Args:
        supervisor: process id and start time.
    """
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError, ValueError):
            if stop_request.supervisor_of(process.environ()) == supervisor and process.status() != psutil.STATUS_ZOMBIE:
                found.add(os.getpgid(process.pid))
    return found


def members(group: int) -> list[psutil.Process]:
    """Return the running processes of a process group, without zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ranks_of(group: int) -> list[psutil.Process]:
    """Return the ranks among the processes of a process group."""
    found = []
    for process in members(group):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if any(word.startswith("--local_rank=") for word in command):  # DeepSpeed's launcher adds it for each rank
                found.append(process)
    return found


def request_stop(group: int, connection_is_lost: bool = False) -> None:
    """Send SIGTERM to the ranks.

    DeepSpeed's launcher does not get the signal: it would kill each rank after 30 seconds.

    Args:
        connection_is_lost: the reason is that their supervisor is not reached any more, which another signal tells.
    """
    ranks = ranks_of(group)
    if not ranks:  # the launcher has not started them yet, so there is nothing to save
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            if connection_is_lost:
                rank.send_signal(stop_request.CONNECTION_LOST)
            rank.send_signal(signal.SIGTERM)


def kill(group: int) -> None:
    """Send SIGKILL to all processes of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
