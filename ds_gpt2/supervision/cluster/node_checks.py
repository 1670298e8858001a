"""What an agent finds out about its host: are code, data and directories the same there, can it connect to rank 0?

Each function is an action that a supervisor requests; ``host_checks`` compares the answers of all hosts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_gpt2.common import installation
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.shared_directory import has_marks, mark, unmark
from ds_gpt2.config import train_arguments
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed.network_interface import addresses, interface_of
from ds_gpt2.supervision.cluster.keyed_connections import Listener
from ds_gpt2.supervision.cluster.keyed_connections import listen as listen_for_key

_PACKAGE = Path(__file__).resolve().parents[2]
_COUNT_GPUS = (
    f"import sys; sys.path.insert(0, {str(_PACKAGE.parent)!r}); "
    "from ds_gpt2.supervision.launcher import gpus_of_machine; print(gpus_of_machine())"
)
_LISTEN_SECONDS = 30.0
_ROUND_TRIPS = 20
_END_SECONDS = 5.0  # for a command to end after SIGTERM
_commands: list[subprocess.Popen[str]] = []  # that run


def facts(arguments: Sequence[str], cwd: str, accelerator: str) -> dict[str, Any]:
    """Return what must be equal on all hosts, and what is needed to place the ranks.

    Args:
        arguments: of train.py.
        cwd: the working directory of the run, which becomes that of the agent.
        accelerator: GPUs are counted unless it is "cpu".

    Raises:
        UserError: the working directory, the settings or the data cannot be read here, or the GPUs cannot be counted.
    """
    try:
        os.chdir(cwd)
    except OSError as error:
        raise UserError(f"the working directory {cwd} cannot be entered: {reason_of(error)}") from None
    settings = train_arguments.parse(arguments).settings()
    return {
        "name": socket.gethostname(),
        "same": {**installation.describe(), "the data": open_sources(settings.data).fingerprint},
        "gpus": None if accelerator == "cpu" else _count_gpus(),
        "addresses": addresses((socket.AF_INET,)),
    }


def listen() -> dict[str, Any]:
    """Answer ``reach`` of other hosts for some seconds; return the listener."""
    return listen_for_key(_echo, _LISTEN_SECONDS)


def reach(addresses: Sequence[str], listener: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Connect to each address, to all at the same time; return the interface and the round trip of those that answer.

    Args:
        listener: what ``listen`` has returned on the other host.

    Returns:
        By address: the interface of this host, None if unknown, and the median round trip in seconds.
    """
    with ThreadPoolExecutor(max(1, len(addresses))) as pool:  # an address that does not answer takes seconds
        answers = pool.map(lambda address: _reach(address, Listener(**listener)), addresses)
        return {address: found for address, found in zip(addresses, answers, strict=True) if found is not None}


def resolve(name: str) -> list[str]:
    """Return the IPv4 addresses of a host name on this host; none if it is unknown."""
    with contextlib.suppress(OSError):
        return sorted(
            {str(found[4][0]) for found in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
        )
    return []


def free_port(address: str) -> int:
    """Return a free port of an address of this host.

    Raises:
        OSError: it is not an address of this host.
    """
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def command(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command of ds_gpt2 on this host; return its exit code and output.

    Args:
        environment: added to the agent's own.
    """
    return _run([sys.executable, str(_PACKAGE / "__main__.py"), *words], environment)


def end_commands() -> None:
    """End the commands that still run: the supervisor is gone, and nothing reads their output."""
    processes = list(_commands)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _count_gpus() -> int:
    """Return the number of GPUs that PyTorch finds.

    Another process imports PyTorch: while its libraries are loaded from a slow disk, no thread of that process runs.

    Raises:
        UserError: PyTorch cannot be imported or fails.
    """
    done = _run([sys.executable, "-c", _COUNT_GPUS], cwd=_PACKAGE.parent)
    if done["code"]:
        raise UserError(f"PyTorch cannot count the GPUs: {done['err'].strip().rpartition(chr(10))[2]}")
    return int(done["out"].split()[-1])


def _run(
    program: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> dict[str, Any]:
    """Run a program that ends with this agent; return its exit code and output.

    Args:
        environment: added to the agent's own.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        program,
        env={**os.environ, **(environment or {})},
        stdout=pipe,
        stderr=pipe,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
    )
    _commands.append(process)
    try:
        out, err = process.communicate()
    finally:
        _commands.remove(process)
    return {"code": process.returncode, "out": out, "err": err}


def _reach(address: str, listener: Listener) -> dict[str, Any] | None:
    """Return the interface and the round trip of a connection to ``address``; None if the listener does not answer."""
    with contextlib.suppress(OSError), listener.connect(address) as connection:
        times = []
        for _ in range(_ROUND_TRIPS):
            start_time = time.perf_counter()
            connection.sendall(b"x")
            if connection.recv(1) != b"x":
                return None  # another program answers
            times.append(time.perf_counter() - start_time)
        own = connection.getsockname()[0]
        return {"interface": interface_of(own), "round_trip": sorted(times)[len(times) // 2]}
    return None


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(_ROUND_TRIPS):
        connection.sendall(data)


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action for action in (facts, mark, has_marks, unmark, listen, reach, resolve, free_port, command)
}
