"""Actions of agents that measure the bandwidth between two hosts: one sends, the other receives for a moment."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_LISTEN_SECONDS, _CONNECT_SECONDS = 60.0, 3.0
_SILENCE_SECONDS = 5.0  # without a byte: the connection is broken
_BLOCK = 1 << 20  # bytes


def send_stream() -> int:
    """Send bytes to the next program that connects, until it closes the connection; return the port.

    The port listens on all addresses, for a minute at most.
    """
    server = socket.create_server(("", 0))
    server.settimeout(_LISTEN_SECONDS)

    def send() -> None:
        with contextlib.suppress(OSError):
            with server:
                connection, _ = server.accept()
            with connection:
                connection.settimeout(_SILENCE_SECONDS)
                block = bytes(_BLOCK)
                while True:
                    connection.sendall(block)

    threading.Thread(target=send, daemon=True).start()
    return int(server.getsockname()[1])


def receive_stream(addresses: Sequence[str], port: int, duration: float) -> float | None:
    """Receive from ``send_stream`` of another host; return the bytes per second, None if no address answers.

    Args:
        addresses: of the other host; the first that answers is used.
        duration: how long to receive from the first byte on, in seconds.

    Raises:
        OSError: the connection breaks.
    """
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), _CONNECT_SECONDS)
        except OSError:
            continue
        with connection:
            connection.settimeout(_SILENCE_SECONDS)
            return _rate(connection, duration)
    return None


def _rate(connection: socket.socket, seconds: float) -> float:
    """Return the bytes per second that arrive after the first ones, which start the time."""
    block = bytearray(_BLOCK)
    received, start_time, elapsed = 0, None, 0.0
    while elapsed < seconds:
        if not (count := connection.recv_into(block)):
            raise ConnectionResetError("the other host has closed the connection")
        if start_time is None:
            start_time = time.perf_counter()
        else:
            received, elapsed = received + count, time.perf_counter() - start_time
    return received / elapsed


ACTIONS: dict[str, Callable[..., Any]] = {action.__name__: action for action in (send_stream, receive_stream)}
