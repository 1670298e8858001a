"""``tensorboard``: the curves of one run or of all, on this machine's loopback address."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ds_gpt2 import machine
from ds_gpt2.commands.train import find_run
from ds_gpt2.config import PROJECT_DIR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory (default: all runs)")
    parser.add_argument("--port", type=int, metavar="PORT", help="default: a free one")


def run(options: argparse.Namespace) -> int:
    logdir: Path = find_run(options.run) if options.run else PROJECT_DIR / "runs"
    port = options.port or machine.free_port()
    machine.check_free("127.0.0.1", port)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logdir),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    print(f"TensorBoard of {logdir}: http://127.0.0.1:{port}/ (Ctrl+C ends it)", flush=True)
    os.execv(sys.executable, command)
