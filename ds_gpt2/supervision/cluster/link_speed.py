"""Actions of agents that measure the bandwidth between two hosts: one sends, the other receives for a moment."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_gpt2.supervision.cluster.keyed_connections import Listener, listen

_LISTEN_SECONDS = 60.0
_BLOCK = 1 << 20  # bytes


def send_stream() -> dict[str, Any]:
    """Send bytes to programs that connect, until they close the connection; return the listener."""
    return listen(_send, _LISTEN_SECONDS)


def receive_stream(addresses: Sequence[str], listener: Mapping[str, Any], duration: float) -> float | None:
    """Receive from ``send_stream`` of another host; return the bytes per second, None if no address answers.

    Args:
        addresses: of the other host; the first that answers is used.
        listener: what ``send_stream`` has returned.
        duration: how long to receive from the first byte on, in seconds.

    Raises:
        OSError: the connection breaks.
    """
    for address in addresses:
        try:
            connection = Listener(**listener).connect(address)
        except OSError:
            continue
        with connection:
            return _rate(connection, duration)
    return None


def _send(connection: socket.socket) -> None:
    block = bytes(_BLOCK)
    while True:
        connection.sendall(block)


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
