"""TCP ports on this machine."""

from __future__ import annotations

import socket

from ds_gpt2.errors import UserError


def free_port() -> int:
    """A port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_free(address: str, port: int) -> None:
    """
    Raises:
        UserError: somebody listens on ``port`` already, usually another run.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(
                f"port {port} is in use ({error.strerror}), perhaps by another run: start with"
                f" `deepspeed --master_port {free_port()} ...`, or with ./launch.sh, which finds a free one"
            ) from None
