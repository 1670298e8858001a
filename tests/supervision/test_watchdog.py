"""When a run counts as hanging: real heartbeats and processes, a clock of the test's own."""

from __future__ import annotations

import os
import random
import resource
import signal
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
from ds_gpt2.supervision.watchdog import Watchdog

SETTINGS = SupervisorSettings(hang_seconds=60, hang_factor=10, patience_minutes=30)


class Watched:
    """Ranks that beat when told to, and a watchdog that looks once a second."""

    def __init__(self, folder: Path, ranks: int = 2, settings: SupervisorSettings = SETTINGS) -> None:
        self.now = 0.0
        self.ranks = [Heartbeat(folder, rank) for rank in range(ranks)]
        self.dog = Watchdog(settings, OpenDirectory(folder), ranks, clock=lambda: self.now)

    def step(self, number: int, seconds: float, silent: int | None = None) -> None:
        for rank, heartbeat in enumerate(self.ranks):
            if rank != silent:
                heartbeat.begin_step(number, number)
        assert self.wait(seconds) is None

    def wait(self, seconds: float) -> str | None:
        """What the watchdog says within that time, if anything."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            if (hang := self.dog.look()) is not None:
                return hang.text
        return None


def test_a_step_may_take_a_multiple_of_the_usual_but_no_more(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=20)
    watched.ranks[0].begin_step(20, 20)
    assert watched.wait(179) is None  # since the step began for rank 1, 199 of the 200 seconds
    text = watched.wait(5)
    assert text is not None and text.startswith("rank 1 has not moved for 20") and "in step 19" in text


def test_short_steps_are_given_the_least_time(tmp_path: Path) -> None:
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
def test_other_phases_have_a_patience_of_their_own_and_progress_renews_it(tmp_path: Path, phase: str) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=1)
    for heartbeat in watched.ranks:
        heartbeat.enter(phase)  # type: ignore[arg-type]  # each of them is one
    assert watched.wait(29 * 60) is None
    for heartbeat in watched.ranks:
        heartbeat.beat()
    assert watched.wait(29 * 60) is None
    assert phase in (watched.wait(2 * 60) or "")


def test_ranks_that_never_speak_are_noticed(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    clear_heartbeats(tmp_path)
    text = watched.wait(31 * 60)
    assert text is not None and "no sign of life" in text


def test_who_was_asleep_itself_blames_nobody(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 20):
        watched.step(number, seconds=1)
    watched.now += 7 * 24 * 3600  # the machine was suspended
    assert watched.dog.look() is None
    assert watched.wait(50) is None
    assert watched.wait(10) is not None


def test_steps_of_every_length_raise_no_alarm(tmp_path: Path) -> None:
    """From 0.2 to 2 seconds, with evaluation of minutes between, 3,000 times."""
    rng, watched = random.Random(7), Watched(tmp_path, ranks=1)
    for number in range(1, 3000):
        watched.step(number, rng.uniform(0.2, 2))
        if number % 250 == 0:
            watched.ranks[0].enter("evaluating")
            assert watched.wait(600) is None


def test_the_stopped_rank_is_the_one_that_is_named(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from ds_gpt2.run_dir.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[2]), 1).begin_step(5, 5); print('ready', flush=True); time.sleep(600)"
    )
    watched = Watched(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(PROJECT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        watched.ranks[0].begin_step(5, 5)
        watched.wait(1)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        text = watched.wait(31 * 60)
        assert text is not None and text.startswith("rank 1") and "its process is stopped" in text
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # it is a pipe


def test_a_beat_tells_where_a_rank_is(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.begin_step(12, 14)
    heartbeat.enter("saving")
    beat = read_beat(tmp_path, 3)
    assert beat is not None
    assert (beat.step, beat.batch, beat.phase, beat.pid) == (12, 14, "saving", os.getpid())
    clear_heartbeats(tmp_path)
    assert read_beat(tmp_path, 3) is None


def test_a_directory_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file is in the way", encoding="ascii")
    Heartbeat(tmp_path, 0).begin_step(1, 1)
    assert read_beat(tmp_path, 0) is None


@pytest.mark.parametrize("trouble", ["away", "full"])
def test_no_hang_is_declared_where_no_sign_of_life_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    watched = Watched(tmp_path)
    for number in range(1, 10):
        watched.step(number, seconds=1)
    beats = tmp_path / "heartbeat"
    if trouble == "away":
        beats.rename(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr("ds_gpt2.supervision.watchdog.beat_problem", lambda _: "No space left on device")
    assert watched.wait(10_000) is None
    assert caplog.text.count("heartbeats cannot be written") == 1
    if trouble == "away":
        (tmp_path / "elsewhere").rename(beats)
    monkeypatch.undo()
    assert "has not moved" in str(watched.wait(200))


def test_a_disk_that_takes_no_sign_of_life_is_recognised(tmp_path: Path) -> None:
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


def test_heartbeats_of_an_earlier_start_that_cannot_be_deleted_are_not_this_ones(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0).begin_step(46, 46)
    watchdog = Watchdog(SupervisorSettings(), OpenDirectory(tmp_path), 1)
    assert watchdog.look() is None and watchdog.newest is None
    Heartbeat(tmp_path, 0).begin_step(47, 47)
    watchdog.look()
    assert watchdog.newest is not None and watchdog.newest.step == 47
