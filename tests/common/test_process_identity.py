"""Processes are identified by their start, independently of the clock."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import is_running, start_of
from ds_gpt2.run_dir import stop_request
from ds_gpt2.run_dir.heartbeat import Heartbeat, read_beat
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord


@pytest.fixture
def _clock_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock by an hour: the start times reported by psutil change with it."""
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 3600)


def test_a_process_is_identified_by_its_start() -> None:
    mine = start_of(os.getpid())
    assert mine is not None and mine == start_of(os.getpid())
    assert " " not in mine and "-" not in mine
    assert is_running(os.getpid(), mine) and not is_running(os.getpid(), mine + "1") and not is_running(1, mine)


def test_an_ended_process_is_not_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = start_of(process.pid)
    assert start is not None and is_running(process.pid, start)
    assert process.stdin is not None
    process.stdin.close()
    psutil.wait_procs([psutil.Process(process.pid)], timeout=1)  # a zombie until its parent waits for it
    while process.poll() is None:
        assert start_of(process.pid) in (start, None)
    assert start_of(process.pid) is None and not is_running(process.pid, start)


@pytest.mark.usefixtures("_clock_set")
def test_a_zombie_is_not_running() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_of(pid) is None
    os.waitpid(pid, 0)


def test_ranks_recognize_their_supervisor_after_the_clock_is_set(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name, value in stop_request.supervisor_environment().items():
        monkeypatch.setenv(name, value)
    asked = stop_request.StopRequest(OpenDirectory(tmp_path_factory.mktemp("run")))
    record = SupervisorRecord(os.getpid(), 0.0, "host", "running", 1, start=start_of(os.getpid()) or "")
    request.getfixturevalue("_clock_set")
    assert not asked.requested and not asked.supervisor_lost
    assert record.is_running()
    monkeypatch.setenv(next(iter(stop_request.supervisor_environment())), f"{os.getpid()} 1.2")
    alone = stop_request.StopRequest(OpenDirectory(tmp_path_factory.mktemp("run")))
    assert alone.requested and alone.supervisor_lost


def test_a_heartbeat_identifies_its_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    Heartbeat(run_dir, 0).begin_step(10**9, 10**9)
    beat = read_beat(run_dir, 0)
    assert beat is not None and beat.step == 10**9 and is_running(beat.pid, beat.start)
    file = next((run_dir / "heartbeat").iterdir())
    file.write_text("3 1.0 7 5 5 training".ljust(95) + "\n")  # as an earlier version wrote it
    beat = read_beat(run_dir, 0)
    assert beat is not None and (beat.pid, beat.start) == (7, "")
