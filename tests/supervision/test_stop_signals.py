"""Signals to the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launched import PROJECT

from ds_gpt2.run_dir.stop_request import SIGNALS
from ds_gpt2.supervision.stop_signals import StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_further_signals_after_a_stop_request_are_ignored_to_the_end_of_the_process(number: signal.Signals) -> None:
    with StopSignals() as stop:
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is signal.SIG_IGN  # also during the shutdown of Python, unlike a handler
    signal.raise_signal(signal.SIGINT)


def test_signals_after_the_end_are_ignored_without_a_stop_request() -> None:
    with StopSignals() as stop:
        assert not stop.requested
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)] == [signal.SIG_IGN] * 4
    signal.raise_signal(signal.SIGINT)


def test_after_an_error_the_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="failed"), StopSignals():
        raise ValueError("failed")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_program_is_ended_by_signals_and_no_earlier_request_is_lost() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.end_requests()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_DFL] * 2
        assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)] == [signal.SIG_IGN] * 2
    with StopSignals() as stop:
        assert not stop.end_requests()


_SUPERVISE = """
import atexit, os, signal, sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ds_gpt2.supervision import supervisor

class Supervisor:
    next_command = sys.argv[3:]
    def __init__(self, *arguments): pass
    def run_to_end(self): return 0

supervisor._Supervisor = Supervisor
atexit.register(os.kill, os.getpid(), signal.SIGINT)  # Ctrl+C during the shutdown of Python
run = SimpleNamespace(name="test")
sys.exit(supervisor.supervise(None, SimpleNamespace(run=run, run_dir=Path(sys.argv[2]))))
"""


def _supervise(run_dir: Path, *next_command: str) -> subprocess.CompletedProcess[str]:
    """Supervise a run that is done, and then execute ``next_command`` if it is not empty."""
    command = [sys.executable, "-c", _SUPERVISE, str(PROJECT), str(run_dir), *next_command]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("next_command", [[], ["/does/not/exist"]])
def test_ctrl_c_during_the_shutdown_of_a_finished_run_does_not_change_its_exit_code(
    tmp_path: Path, next_command: list[str]
) -> None:
    ended = _supervise(tmp_path, *next_command)
    assert ended.returncode == 0
    assert ended.stderr == ("cannot start /does/not/exist: No such file or directory\n" if next_command else "")


def test_the_program_that_resumes_a_moved_run_does_not_ignore_signals(tmp_path: Path) -> None:
    ignored = "import signal; print([n.name for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN])"
    usual = subprocess.run([sys.executable, "-c", ignored], capture_output=True, text=True).stdout
    assert "SIGINT" not in usual
    assert _supervise(tmp_path, sys.executable, "-c", ignored).stdout == usual
    assert os.listdir(tmp_path / "supervisor") == ["lock"]
