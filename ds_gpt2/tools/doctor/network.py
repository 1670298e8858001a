"""Ports and loopback, over which ranks meet; TensorBoard's port."""

from __future__ import annotations

import contextlib
import socket
import time

import psutil

from ds_gpt2.common.host import free_port
from ds_gpt2.tools.doctor.row import Finding

DEEPSPEED_PORT = 29_500
TENSORBOARD_PORT = 6006

_PATIENCE = 2.0  # seconds; on loopback microseconds are usual


def loopback() -> Finding:
    """A port of one's own choosing, a connection to it, and bytes both ways: what a rendezvous needs."""
    fix = "the ranks cannot meet: `ip addr show lo` must have 127.0.0.1 (`sudo ip link set lo up`)"
    try:
        begun = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(_PATIENCE)
            with socket.create_connection(server.getsockname(), _PATIENCE) as there:
                here, _ = server.accept()
                with here:
                    there.sendall(b"ds_gpt2")
                    if here.recv(16) != b"ds_gpt2":
                        raise OSError("something else arrived than was sent")
        taken = time.monotonic() - begun
    except OSError as error:
        return Finding("loopback", "fail", f"no connection over 127.0.0.1: {error}", fix)
    return Finding("loopback", "ok", f"the ranks can meet on a free port, connected in {taken * 1e3:.1f} ms")


def deepspeed_port(port: int = DEEPSPEED_PORT) -> Finding:
    """Only for those who start DeepSpeed's launcher themselves: launch.sh takes a free one."""
    name = f"port {port}"
    if is_free(port):
        return Finding(name, "ok", "free (the ranks' own, where you start `deepspeed` yourself)")
    fix = f"`deepspeed --master_port {free_port()} ...` where you start it yourself; ./launch.sh finds a free one"
    return Finding(name, "warn", f"taken{_holder(port)}", fix)


def tensorboard_port(port: int = TENSORBOARD_PORT) -> Finding:
    """TensorBoard's usual one."""
    name = f"port {port}"
    if is_free(port):
        return Finding(name, "ok", "free (TensorBoard's)")
    return Finding(name, "warn", f"taken{_holder(port)}", "`./launch.sh tensorboard` takes the next, and says which")


def is_free(port: int) -> bool:
    """Whether ``port`` of loopback can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):  # not every user may see every connection
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
