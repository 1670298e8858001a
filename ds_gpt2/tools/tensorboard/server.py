"""Serve the event files of runs with TensorBoard, and the commands for access from another computer."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import free_port
from ds_gpt2.config.lookup import is_run
from ds_gpt2.config.run_location import CONFIG, event_directory

# The number of points per tag that TensorBoard loads; it samples longer series at random. Its defaults (1000, 100 and
# 500) show few of 100,000 steps and omit notes, but send more histograms than can be distinguished.
SAMPLES = {"scalars": 5000, "text": 1000, "histograms": 100}

REFRESH_SECONDS = 5.0  # TensorBoard's own default


def runs_in(directory: Path) -> list[Path]:
    """Return the runs in a directory of runs, or the run that ``directory`` is."""
    try:
        if (directory / CONFIG).is_file():
            return [directory]
        return sorted(path for path in directory.glob("*") if is_run(path))
    except OSError:  # such as a name that is too long
        return []


def link_runs(directory: Path, links: Path) -> None:
    """Update ``links`` so that it has one link per run, with the run's name, to its event files.

    With the links TensorBoard finds runs that start later and event files in other directories, and shows each run
    under its name. Links of deleted runs are removed.

    Args:
        directory: a run's directory, or a directory of runs.
    """
    for link in links.iterdir():
        if not link.is_dir():
            link.unlink()
    for run_dir in runs_in(directory):
        link = links / run_dir.resolve().name
        if not link.is_symlink() and (events := event_directory(run_dir)).is_dir():
            link.symlink_to(events.resolve())


def has_events(links: Path) -> bool:
    """Return whether any linked run has an event file."""
    return any(True for link in links.iterdir() for _ in link.resolve().rglob("*tfevents*"))


def launch(links: Path, host: str, port: int | None, title: str) -> int:
    """Start TensorBoard in a thread of this process; return its port.

    Args:
        port: None: 6006, or the next free port.

    Raises:
        UserError: TensorBoard cannot be imported, or cannot listen on the port.
    """
    program = _import_tensorboard()
    board = program.TensorBoard()
    board.configure(
        logdir=str(links),
        host=host,
        port=port,
        window_title=title,
        samples_per_plugin=SAMPLES,
        reload_interval=REFRESH_SECONDS,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # advertises its data server
            url = board.launch()
    except program.TensorBoardPortInUseError:
        raise UserError(f"port {port} is in use: omit --port, or give another, such as {free_port()}") from None
    except program.TensorBoardServerException as error:
        message = " ".join(error.msg.split())
        raise UserError(f"{message} (give --port {free_port()}, which is free)") from None
    return int(urlsplit(url).port or 0)


def ssh_command(port: int) -> str:
    """Return the command that forwards ``localhost:port`` of another computer to this machine."""
    connection = os.environ.get("SSH_CONNECTION", "").split()  # the client's address and port, then the server's
    address, ssh_port = connection[2:] if len(connection) == 4 else (own_address(), "22")
    other_port = "" if ssh_port == "22" else f"-p {ssh_port} "
    return f"ssh -N -L {port}:localhost:{port} {other_port}{_user()}@{address}"


def tmux_command(run: str | None, port: int, open_to_network: bool = False) -> str:
    """Return the command that starts the same server in a tmux session, which continues after logout."""
    words = ["./launch.sh", "tensorboard", *([run] if run else []), "--port", str(port)]
    serve = shlex.join([*words, "--open-to-network"] if open_to_network else words)
    return f"tmux new -d -s tensorboard {shlex.quote(serve)}"


def own_address() -> str:
    """Return the name or address by which other machines most probably reach this machine."""
    name = socket.getfqdn()
    if "." in name and not name.startswith("localhost"):
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only selects the source address
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _import_tensorboard() -> Any:
    try:
        from tensorboard import program
    except Exception as error:  # a broken installation fails in many ways
        raise UserError(
            f"TensorBoard cannot be imported ({type(error).__name__}: {error}): reinstall it with"
            f" `{sys.executable} -m pip install --force-reinstall tensorboard`"
        ) from None
    return program


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return "USER"
