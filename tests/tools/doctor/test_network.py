"""Checks of ports and loopback."""

from __future__ import annotations

import os
import socket

from ds_gpt2.tools.doctor import network


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for row in (network.tensorboard_port(port), network.deepspeed_port(port)):
            assert (row.name, row.status) == (f"port {port}", "warn")
            assert f"by process {os.getpid()}" in row.found
    assert network.tensorboard_port(port).status == "ok"
    assert network.loopback().status == "ok"
