"""Start the ranks with DeepSpeed's launcher, pass requests to stop on to them, and leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from ds_gpt2 import outcome
from ds_gpt2.config import Settings
from ds_gpt2.errors import UserError
from ds_gpt2.machine import free_port

TRAIN = Path(__file__).with_name("train.py")
CPU_RANKS = 4

_GRACE_SECONDS = 60.0  # how long processes may outlive DeepSpeed's launcher before they are killed


def choose_ranks(settings: Settings, wanted: int | None) -> tuple[str, int]:
    """(accelerator, ranks): every GPU there is, else four ranks on the CPU, unless told otherwise.

    Raises:
        UserError: CUDA is asked for and missing, or more ranks than GPUs are.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = settings.run.device
    if accelerator == "auto":
        accelerator = "cuda" if gpus and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    if accelerator == "cpu":
        return "cpu", wanted or CPU_RANKS
    if not gpus:
        raise UserError(f"run.device is cuda, but PyTorch {torch.__version__} sees no GPU: set run.device=cpu")
    if wanted and wanted > gpus:
        raise UserError(f"--num_gpus {wanted}, but this machine shows {gpus} GPU(s)")
    return accelerator, wanted or gpus


def run_ranks(arguments: list[str], accelerator: str, ranks: int) -> int:
    """Run ``train.py`` with ``arguments`` on ``ranks`` ranks and wait; returns the run's exit code (see outcome)."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    where = _which_devices(accelerator, ranks)
    command = [*launcher, *where, "--master_port", str(free_port()), str(TRAIN), *arguments]
    with tempfile.TemporaryDirectory(prefix="ds_gpt2-") as folder:
        file = Path(folder) / "outcome"
        environment = {**os.environ, **outcome.request(file), "DS_ACCELERATOR": accelerator}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # what it said is in the command
        # A session of its own: Ctrl+C reaches this process alone, which then asks the ranks to save and stop.
        with _stop_requests() as requests:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            requests.go_to(process.pid)
            process.wait()
            _wait_until_gone(process.pid)
        return outcome.read(file)


def _which_devices(accelerator: str, ranks: int) -> list[str]:
    """DeepSpeed's ``--num_gpus`` takes the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if accelerator != "cuda" or not visible:
        return ["--num_gpus", str(ranks)]
    numbers = visible.split(",")[:ranks]
    if not all(number.strip().isdigit() for number in numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed needs GPUs by number, for example 0,1")
    return ["--include", "localhost:" + ",".join(number.strip() for number in numbers)]


class _StopRequests:
    """Where requests to stop go, also one that comes before there is anything to stop."""

    def __init__(self) -> None:
        self._runner: int | None = None
        self._asked = False

    def go_to(self, runner: int) -> None:
        self._runner = runner
        if self._asked:
            self._ask()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """As a signal handler."""
        self._asked = True
        if self._runner is not None:
            self._ask()

    def _ask(self) -> None:
        """SIGTERM to the ranks themselves: DeepSpeed's launcher would give each 30 seconds and then kill it."""
        assert self._runner is not None
        ranks = _ranks(self._runner)
        if not ranks:  # still starting: there is nothing to save
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._runner, signal.SIGTERM)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _stop_requests() -> Iterator[_StopRequests]:
    """From here on Ctrl+C, SIGTERM and a closing terminal ask the ranks to stop."""
    requests = _StopRequests()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means: outlive the terminal
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, requests.stop) for number in signals}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks(runner: int) -> list[psutil.Process]:
    found = []
    for process in _members(runner):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if str(TRAIN) in command and not any("deepspeed.launcher" in word for word in command):
                found.append(process)
    return found


def _members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def _wait_until_gone(group: int) -> None:
    """DeepSpeed's runner may end before the ranks do. What is left after the grace period is killed."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while _members(group):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(0.1)
