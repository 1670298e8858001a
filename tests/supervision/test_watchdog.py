"""The detection of hangs, with real heartbeats and processes and a simulated clock."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launched import PROJECT

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.heartbeat import Heartbeat, beat_problem, clear_heartbeats, read_beat
from ds_gpt2.supervision.rank_heartbeats import LocalHeartbeats
from ds_gpt2.supervision.watchdog import Watchdog

SETTINGS = SupervisorSettings(hang_seconds=60, hang_factor=10, patience_minutes=30)


class Watched:
    """Ranks whose heartbeats the test writes, and a watchdog that checks them once a second of simulated time."""

    def __init__(self, folder: Path, ranks: int = 2, settings: SupervisorSettings = SETTINGS) -> None:
        self.now = 0.0
        self.ranks = [Heartbeat(folder, rank) for rank in range(ranks)]
        self.watchdog = Watchdog(
            settings, LocalHeartbeats(OpenDirectory(folder), range(ranks)), ranks, clock=lambda: self.now
        )

    def step(self, number: int, seconds: float, silent: int | None = None) -> None:
        for rank, heartbeat in enumerate(self.ranks):
            if rank != silent:
                heartbeat.begin_step(number, number)
        assert self.wait(seconds) is None

    def wait(self, seconds: float) -> str | None:
        """Return the hang that the watchdog detects within ``seconds``; None if there is none."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            if (hang := self.watchdog.check()) is not None:
                return hang.text
        return None


def test_a_step_may_take_hang_factor_times_the_usual(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=20)
    watched.ranks[0].begin_step(20, 20)
    assert watched.wait(179) is None  # 199 of the 200 seconds since rank 1 began the step
    text = watched.wait(5)
    assert text is not None and text.startswith("rank 1 has made no progress for 20") and "in step 19" in text


def test_a_short_step_may_take_hang_seconds(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 100):
        watched.step(number, seconds=1)
    assert watched.wait(58) is None
    assert watched.wait(3) is not None


def test_the_first_step_may_compile(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step(1, seconds=25 * 60)
    assert watched.wait(6 * 60) is not None


@pytest.mark.parametrize("phase", ["evaluating", "saving", "finishing"])
def test_other_phases_have_patience_minutes_from_the_newest_heartbeat(tmp_path: Path, phase: str) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=1)
    for heartbeat in watched.ranks:
        heartbeat.enter(phase)  # type: ignore[arg-type]  # a Phase
    assert watched.wait(29 * 60) is None
    for heartbeat in watched.ranks:
        heartbeat.beat()
    assert watched.wait(29 * 60) is None
    assert phase in (watched.wait(2 * 60) or "")


def test_ranks_without_any_heartbeat_are_a_hang(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    clear_heartbeats(tmp_path)
    text = watched.wait(31 * 60)
    assert text is not None and "has written no heartbeat for" in text


def test_a_suspend_of_the_machine_is_not_a_hang(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=1)
    watched.now += 7 * 24 * 3600  # the machine is suspended
    assert watched.watchdog.check() is None
    assert watched.wait(50) is None
    assert watched.wait(10) is not None


def test_steps_of_varying_length_are_not_a_hang(tmp_path: Path) -> None:
    """3,000 steps of 0.2 to 2 seconds, with evaluations of 10 minutes."""
    rng, watched = random.Random(7), Watched(tmp_path, ranks=1)
    for number in range(1, 3000):
        watched.step(number, rng.uniform(0.2, 2))
        if number % 250 == 0:
            watched.ranks[0].enter("evaluating")
            assert watched.wait(600) is None


def test_the_hang_names_the_rank_whose_process_is_stopped(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from ds_gpt2.run_dir.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[2]), 1).begin_step(6, 6); print('ready', flush=True); time.sleep(600)"
    )
    watched = Watched(tmp_path)
    watched.ranks[0].begin_step(5, 5)
    watched.wait(1)  # rank 0 has been silent for longer, and has made less progress
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(PROJECT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        watched.wait(1)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        text = watched.wait(31 * 60)
        assert text is not None and text.startswith("rank 1") and "its process is stopped" in text
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # a pipe


def test_a_heartbeat_has_the_step_batch_phase_and_pid(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.begin_step(12, 14)
    heartbeat.enter("saving")
    beat = read_beat(tmp_path, 3)
    assert beat is not None
    assert (beat.step, beat.batch, beat.phase, beat.pid) == (12, 14, "saving", os.getpid())
    clear_heartbeats(tmp_path)
    assert read_beat(tmp_path, 3) is None


def test_a_heartbeat_that_cannot_be_written_raises_no_error(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file instead of the directory", encoding="ascii")
    Heartbeat(tmp_path, 0).begin_step(1, 1)
    assert read_beat(tmp_path, 0) is None


@pytest.mark.parametrize("problem", ["missing", "full"])
def test_no_hang_is_detected_while_heartbeats_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 10):
        watched.step(number, seconds=1)
    beats = tmp_path / "heartbeat"
    if problem == "missing":
        beats.rename(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr("ds_gpt2.supervision.rank_heartbeats.beat_problem", lambda _: "No space left on device")
    assert watched.wait(10_000) is None
    assert caplog.text.count("heartbeats cannot be written") == 1
    if problem == "missing":
        (tmp_path / "elsewhere").rename(beats)
    monkeypatch.undo()
    assert "has made no progress" in str(watched.wait(200))


def test_beat_problem_detects_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    assert beat_problem(tmp_path) is not None
    Heartbeat(tmp_path, 0)
    assert beat_problem(tmp_path) is None and [path.name for path in (tmp_path / "heartbeat").iterdir()] == [
        "rank_00000"
    ]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        assert beat_problem(tmp_path) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_heartbeats_of_an_earlier_launch_are_ignored(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0).begin_step(46, 46)
    watchdog = Watchdog(SupervisorSettings(), LocalHeartbeats(OpenDirectory(tmp_path), range(1)), 1)
    assert watchdog.check() is None and watchdog.newest is None
    Heartbeat(tmp_path, 0).begin_step(47, 47)
    watchdog.check()
    assert watchdog.newest is not None and watchdog.newest.step == 47


def test_ranks_of_an_earlier_launch_on_a_lost_host_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeats = LocalHeartbeats(OpenDirectory(tmp_path), range(1))
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "elsewhere")
        left = Heartbeat(tmp_path, 0)
    assert heartbeats.read() == [None]
    Heartbeat(tmp_path, 0).begin_step(3, 3)
    beat = heartbeats.read()[0]
    assert beat is not None and beat.step == 3
    left.beat()
    assert heartbeats.read() == [None]
