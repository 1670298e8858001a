"""Check loopback, over which the ranks connect, and the ports of DeepSpeed and TensorBoard."""

from __future__ import annotations

import contextlib
import socket
import time

import psutil

from ds_gpt2.common.host import free_port
from ds_gpt2.tools.doctor.finding import Finding

DEEPSPEED_PORT = 29_500
TENSORBOARD_PORT = 6006

_TIMEOUT = 2.0  # seconds; a connection over loopback usually takes microseconds


def loopback() -> Finding:
    """Check that a program can connect to a free port of 127.0.0.1, as the ranks' rendezvous does."""
    fix = "the ranks cannot connect: `ip addr show lo` must show 127.0.0.1 (`sudo ip link set lo up`)"
    try:
        start_time = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(_TIMEOUT)
            with socket.create_connection(server.getsockname(), _TIMEOUT) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"ds_gpt2")
                    if accepted.recv(16) != b"ds_gpt2":
                        raise OSError("the received bytes differ from those that were sent")
        taken = time.monotonic() - start_time
    except OSError as error:
        return Finding("loopback", "fail", f"no connection over 127.0.0.1: {error}", fix)
    return Finding("loopback", "ok", f"the ranks can connect on a free port, within {taken * 1e3:.1f} ms")


def deepspeed_port(port: int = DEEPSPEED_PORT) -> Finding:
    """Check the default port of DeepSpeed's launcher. launch.sh chooses a free port instead."""
    name = f"port {port}"
    if is_free(port):
        return Finding(name, "ok", "free (used if you start `deepspeed` yourself)")
    fix = f"if you start it yourself: `deepspeed --master_port {free_port()} ...`; ./launch.sh chooses a free port"
    return Finding(name, "warn", f"in use{_holder(port)}", fix)


def tensorboard_port(port: int = TENSORBOARD_PORT) -> Finding:
    """Check the default port of TensorBoard."""
    name = f"port {port}"
    if is_free(port):
        return Finding(name, "ok", "free (used by TensorBoard)")
    fix = "`./launch.sh tensorboard` uses the next free port and prints its number"
    return Finding(name, "warn", f"in use{_holder(port)}", fix)


def is_free(port: int) -> bool:
    """Return whether a program can listen on ``port`` of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    """Return ``by process PID (NAME)`` with a leading space; an empty string if the process is not visible."""
    with contextlib.suppress(psutil.Error, OSError):  # not every user may list all connections
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
