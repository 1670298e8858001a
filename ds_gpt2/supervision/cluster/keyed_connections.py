"""Connections between the agents of two hosts, for measurements: only a program that knows the key is answered."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_CONNECT_SECONDS = 3.0
_KEY_BYTES = 16
_SILENCE_SECONDS = 5.0  # without a byte: the connection is broken


@dataclass(frozen=True)
class Listener:
    """How to reach ``listen``."""

    port: int
    key: str  # hexadecimal

    def connect(self, address: str) -> socket.socket:
        """Return a connection that has sent the key.

        Raises:
            OSError: there is no connection within three seconds.
        """
        connection = socket.create_connection((address, self.port), _CONNECT_SECONDS)
        connection.settimeout(_SILENCE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(bytes.fromhex(self.key))
        return connection


def listen(serve: Callable[[socket.socket], None], seconds: float) -> dict[str, Any]:
    """Accept connections on a free port of all IPv4 addresses for ``seconds``; return the fields of a ``Listener``.

    Args:
        serve: called in a thread for each connection that begins with the key; it may raise OSError.
    """
    server = socket.create_server(("", 0))
    key = secrets.token_bytes(_KEY_BYTES)
    deadline = time.monotonic() + seconds

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_SILENCE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received = b""
            while len(received) < _KEY_BYTES and (data := connection.recv(_KEY_BYTES - len(received))):
                received += data
            if hmac.compare_digest(received, key):
                serve(connection)

    def accept() -> None:
        with server, contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                connection, _ = server.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return asdict(Listener(int(server.getsockname()[1]), key.hex()))
