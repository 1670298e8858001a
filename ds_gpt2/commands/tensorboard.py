"""``tensorboard``: the curves of one run or of all, in a browser here or far away."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ds_gpt2.commands.runs import find_run
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import free_port
from ds_gpt2.config.run_location import CONFIG, load_run_settings
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir import exit_report

# How many points of a tag TensorBoard holds and sends; where there are more it draws them at random. Its own choice,
# 1000, 100 and 500, shows few of 100,000 steps and loses notes, but sends more histograms than one can tell apart.
SAMPLES = {"scalars": 5000, "text": 1000, "histograms": 100}

_REFRESH_SECONDS = 5.0  # as often as TensorBoard itself looks for something new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name or directory, or a directory of runs (default: all runs)"
    )
    parser.add_argument("--port", type=_port, metavar="N", help="default: 6006, or the next that is free")
    parser.add_argument(
        "--open-to-network",
        action="store_true",
        help="let every machine that reaches this one read everything, without a password",
    )


def run(options: argparse.Namespace) -> int:
    place = _find_place(options.run)
    host = "0.0.0.0" if options.open_to_network else "127.0.0.1"
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ds_gpt2-tensorboard-") as folder, contextlib.suppress(KeyboardInterrupt):
        links = Path(folder)
        link_runs(place, links)
        port = _launch(links, host, options.port, place.resolve().name)
        _say(place, port, options.run, options.open_to_network, any(_event_files(links)))
        while True:
            time.sleep(_REFRESH_SECONDS)
            link_runs(place, links)
    return exit_report.DONE


def event_directory(run_dir: Path) -> Path:
    """Where the event files of the run in ``run_dir`` are, or will be."""
    usual = run_dir / "tensorboard"
    try:
        configured = load_run_settings(run_dir).tensorboard_dir
    except UserError:  # of another version, or damaged: no reason to show nothing
        return usual
    return usual if usual.is_dir() and not configured.is_dir() else configured  # monitor.dir may not have moved along


def link_runs(place: Path, links: Path) -> None:
    """Make ``links`` hold one link a run, by the run's name, to its event files; those of runs that are gone go.

    So TensorBoard finds runs that start later and event files that lie elsewhere, and calls each run by its name.

    Args:
        place: a run's directory, or a directory of runs.
    """
    for link in links.iterdir():
        if not link.is_dir():
            link.unlink()
    for run_dir in _runs_in(place):
        link = links / run_dir.resolve().name
        if not link.is_symlink() and (events := event_directory(run_dir)).is_dir():
            link.symlink_to(events.resolve())


def ssh_command(port: int) -> str:
    """What a person types on another computer, so that its ``localhost:port`` is this machine's."""
    connection = os.environ.get("SSH_CONNECTION", "").split()  # the client's address and port, then the server's
    address, ssh_port = connection[2:] if len(connection) == 4 else (_own_address(), "22")
    other_port = "" if ssh_port == "22" else f"-p {ssh_port} "
    return f"ssh -N -L {port}:localhost:{port} {other_port}{_user()}@{address}"


def tmux_command(run: str | None, port: int, open_to_network: bool = False) -> str:
    """What serves the same in a session that outlives the login."""
    words = ["./launch.sh", "tensorboard", *([run] if run else []), "--port", str(port)]
    serve = shlex.join([*words, "--open-to-network"] if open_to_network else words)
    return f"tmux new -d -s tensorboard {shlex.quote(serve)}"


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise ValueError(text)
    return number


def _find_place(word: str | None) -> Path:
    """A run's directory, or a directory of runs."""
    if word is None:
        return PROJECT_DIR / "runs"
    return Path(word) if _runs_in(Path(word)) else find_run(word)


def _runs_in(place: Path) -> list[Path]:
    try:
        if (place / CONFIG).is_file():
            return [place]
        return sorted(config.parent for config in place.glob(f"*/{CONFIG}"))
    except OSError:  # such as a name that is too long
        return []


def _event_files(links: Path) -> list[Path]:
    return [file for link in links.iterdir() for file in link.resolve().rglob("*tfevents*")]


def _launch(links: Path, host: str, port: int | None, title: str) -> int:
    """Start TensorBoard in a thread of this process; returns its port.

    Raises:
        UserError: it cannot be loaded, or cannot listen there.
    """
    program = _import_tensorboard()
    board = program.TensorBoard()
    board.configure(
        logdir=str(links),
        host=host,
        port=port,
        window_title=title,
        samples_per_plugin=SAMPLES,
        reload_interval=_REFRESH_SECONDS,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it praises its fast reader, and asks for reports
            url = board.launch()
    except program.TensorBoardPortInUseError:
        raise UserError(f"port {port} is in use: leave --port out, or give another, such as {free_port()}") from None
    except program.TensorBoardServerException as error:
        message = " ".join(error.msg.split())
        raise UserError(f"{message} (give --port {free_port()}, which is free)") from None
    return int(urlsplit(url).port or 0)


def _import_tensorboard() -> Any:
    try:
        from tensorboard import program
    except Exception as error:  # a broken installation fails in many ways
        raise UserError(
            f"TensorBoard cannot be loaded ({type(error).__name__}: {error}): install it again with"
            f" `{sys.executable} -m pip install --force-reinstall tensorboard`"
        ) from None
    return program


def _say(place: Path, port: int, run: str | None, open_to_network: bool, has_events: bool) -> None:
    address = _own_address() if open_to_network else "127.0.0.1"
    print(f"TensorBoard of {place}: http://{address}:{port}/ (Ctrl+C ends it)")
    if not has_events:
        print("no curves yet: they appear as soon as a run has written some")
    if open_to_network:
        print(
            f"WARNING: everybody who can reach this machine's port {port} reads everything (curves, settings, samples,"
            " notes). There is no password.",
            file=sys.stderr,
        )
    else:
        print(f"From another computer (by the name you log in with), then open http://localhost:{port}/ there:")
        print(f"  {ssh_command(port)}")
    if "TMUX" not in os.environ:
        print("To keep it after you log out:")
        print(f"  {tmux_command(run, port, open_to_network)}")
    sys.stdout.flush()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "USER"


def _own_address() -> str:
    """The name or address by which other machines most probably know this one."""
    name = socket.getfqdn()
    if "." in name and not name.startswith("localhost"):
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses the address to send from
        return str(probe.getsockname()[0])
    return socket.gethostname()
