"""Ports and cores of this machine."""

from __future__ import annotations

import errno
import os
import socket

from ds_gpt2.common.errors import UserError


def free_port() -> int:
    """Return a TCP port of the loopback address that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port_free(address: str, port: int) -> None:
    """Check that ``port`` of ``address`` is free.

    Raises:
        UserError: the port is in use, usually by another run, or the address is unknown.
    """
    try:
        family, *_, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"{address}, the address of rank 0, cannot be resolved ({error.strerror}): check MASTER_ADDR"
        ) from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(socket_address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # e.g. a translated address: PyTorch listens on all interfaces
                return
            raise UserError(
                f"port {port} is in use, perhaps by another run: start with"
                f" `deepspeed --master_port {free_port()} ...`, or with ./launch.sh, which finds a free one"
            ) from None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
