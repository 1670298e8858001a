"""``tensorboard``: start TensorBoard for one run or for all runs, also for access over ssh."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from ds_gpt2.commands.arguments import whole_number
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.settings import PROJECT_DIR, RUNS
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.tensorboard import server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name or directory, or a directory of runs (default: all runs)"
    )
    parser.add_argument("--port", type=_port, metavar="N", help="default: 6006, or the next free port")
    parser.add_argument(
        "--open-to-network",
        action="store_true",
        help="allow every machine that can reach this one to read everything, without a password",
    )


def run(options: argparse.Namespace) -> int:
    directory = _find_directory(options.run)
    host = "0.0.0.0" if options.open_to_network else "127.0.0.1"
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ds_gpt2-tensorboard-") as folder, contextlib.suppress(KeyboardInterrupt):
        links = Path(folder)
        server.link_runs(directory, links)
        port = server.launch(links, host, options.port, directory.resolve().name)
        _print_instructions(directory, port, options.run, options.open_to_network, server.has_events(links))
        while True:
            time.sleep(server.REFRESH_SECONDS)
            server.link_runs(directory, links)
    return exit_codes.DONE


def _port(text: str) -> int:
    """Parse a port, as a type for argparse."""
    return whole_number(text, 1, "from 1 to 65535", 65535)


def _find_directory(name: str | None) -> Path:
    """Return a run's directory, or a directory of runs."""
    if name is None:
        return PROJECT_DIR / RUNS
    return Path(name) if server.runs_in(Path(name)) else find_run(name)


def _print_instructions(directory: Path, port: int, run: str | None, open_to_network: bool, has_events: bool) -> None:
    address = server.own_address() if open_to_network else "127.0.0.1"
    print(f"TensorBoard of {directory}: http://{address}:{port}/ (Ctrl+C stops it)")
    if not has_events:
        print("no curves yet: they appear when a run has written some")
    if open_to_network:
        print(
            f"WARNING: anyone who can reach port {port} of this machine can read everything (curves, settings, samples,"
            " notes). There is no password.",
            file=sys.stderr,
        )
    else:
        print(f"From another computer (with your login name), then open http://localhost:{port}/ there:")
        print(f"  {server.ssh_command(port)}")
    if "TMUX" not in os.environ:
        print("To keep it running after you log out:")
        print(f"  {server.tmux_command(run, port, open_to_network)}")
    sys.stdout.flush()
