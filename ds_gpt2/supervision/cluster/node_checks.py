"""What an agent finds out about its host: is the same code there, the same data, the same directories, a way to rank 0?

Each function is an action that a supervisor requests; ``host_checks`` compares the answers of all hosts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_gpt2.common import installation
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.shared_directory import has_marks, mark, unmark
from ds_gpt2.config import train_arguments
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.distributed.network_interface import addresses, interface_of
from ds_gpt2.supervision.launcher import gpus_of_machine

_PACKAGE = Path(__file__).resolve().parents[2]
_LISTEN_SECONDS, _CONNECT_SECONDS = 15.0, 3.0
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
        UserError: the working directory, the settings or the data cannot be read here.
    """
    try:
        os.chdir(cwd)
    except OSError as error:
        raise UserError(f"the working directory {cwd} cannot be entered: {reason_of(error)}") from None
    settings = train_arguments.parse(arguments).settings()
    return {
        "name": socket.gethostname(),
        "same": {**installation.describe(), "the data": open_dataset(settings.data.dir).fingerprint},
        "gpus": None if accelerator == "cpu" else gpus_of_machine(),
        "addresses": addresses((socket.AF_INET,)),
    }


def listen() -> int:
    """Answer connections on a free port of all addresses for some seconds; return the port."""
    server = socket.create_server(("", 0))
    server.settimeout(_LISTEN_SECONDS)

    def answer() -> None:
        with server, contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                threading.Thread(target=_echo, args=(connection,), daemon=True).start()

    threading.Thread(target=answer, daemon=True).start()
    return int(server.getsockname()[1])


def reach(addresses: Sequence[str], port: int) -> dict[str, dict[str, Any]]:
    """Connect to ``port`` of each address; return the interface and the round trip (seconds) for those that answer."""
    found = {}
    for address in addresses:
        with contextlib.suppress(OSError), socket.create_connection((address, port), _CONNECT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(_ROUND_TRIPS):
                start_time = time.perf_counter()
                connection.sendall(b"x")
                if connection.recv(1) != b"x":
                    raise OSError("another program answers")
                times.append(time.perf_counter() - start_time)
            own = connection.getsockname()[0]
            found[address] = {"interface": interface_of(own), "round_trip": sorted(times)[len(times) // 2]}
    return found


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
    program = [sys.executable, str(_PACKAGE / "__main__.py"), *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        program, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
    )
    _commands.append(process)
    try:
        out, err = process.communicate()
    finally:
        _commands.remove(process)
    return {"code": process.returncode, "out": out, "err": err}


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


def _echo(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(_LISTEN_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(1 << 16):
            connection.sendall(data)


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action for action in (facts, mark, has_marks, unmark, listen, reach, resolve, free_port, command)
}
