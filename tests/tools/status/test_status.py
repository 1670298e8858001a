"""What ``status`` makes of a run's files, and of the processes that there are."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import TRAIN, Run

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import LOCK, rolling_tag
from ds_gpt2.common.formatting import clock
from ds_gpt2.config.settings import load_settings
from ds_gpt2.monitoring.reference_curves import REFERENCE_CURVE
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.heartbeat import Heartbeat, Phase, read_beat
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord
from ds_gpt2.tools.resources import disk_forecast, history
from ds_gpt2.tools.resources.disk_forecast import RunProgress
from ds_gpt2.tools.resources.run_steps import epochs_per_step, total_steps
from ds_gpt2.tools.status import status as figures
from ds_gpt2.tools.status.progress import reference_loss
from ds_gpt2.tools.status.screen import WIDTH, line, screen
from ds_gpt2.tools.status.status import Status

HOUR, DAY = 3600.0, 86_400.0
NOW = time.time()

CONFIG = """
run: {name: test, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: FOLDER/data}
schedule: {steps: 2000, warmup_steps: 1}
checkpoint: {dir: FOLDER/checkpoints, every: 100, min_free_gb: 0}
"""


class Files:
    """The files of a run, as hands have written them. Steps take ten seconds; the newest is done now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "runs" / "test"
        self.run_dir.mkdir(parents=True)
        self.configure(CONFIG)

    def configure(self, text: str) -> None:
        (self.run_dir / "config.yaml").write_text(text.replace("FOLDER", str(self.folder)), encoding="utf-8")

    def train(self, steps: int, seconds: float = 10.0, **values: float) -> None:
        records = [
            {"step": step, "time": NOW - seconds * (steps - step), "train/loss": 10.0 - step / 1000, **values}
            for step in range(1, steps + 1)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")

    def note(
        self,
        kind: str,
        ago: float,
        step: int | None = None,
        text: str = "as it was",
        facts: dict[str, Any] | None = None,
    ) -> None:
        event = {"time": NOW - ago, "kind": kind, "step": step, "text": text, "facts": facts or {}}
        with (self.run_dir / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(event) + "\n")

    def save(self, step: int, size: int = 1000, state: dict[str, Any] | None = None) -> Path:
        directory, tag = self.folder / "checkpoints" / "test", rolling_tag(step)
        (directory / (tag + ".tmp")).mkdir(parents=True)
        (directory / (tag + ".tmp") / "model.pt").write_bytes(bytes(size))
        state = {"step": step, "val_loss": 5.5, "val_step": step - 1, **(state or {})}
        files = {"model.pt": FileEntry(bytes=size, sha256="0" * 64)}
        created = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(NOW))
        manifest = Manifest(
            created=created, epoch=0.5, state=state, world_size=1, identity={}, settings={}, versions={}, files=files
        )
        commit.commit(Disk(), directory, tag, manifest)
        return directory / tag

    def supervise(self, state: Any, pid: int | None = None, **values: Any) -> None:
        """By this process, or by another."""
        process = psutil.Process(pid)
        values = {"host": socket.gethostname(), "ranks": 1, **values}
        SupervisorRecord(process.pid, process.create_time(), state=state, **values).write(self.run_dir)

    def beat(self, phase: Phase = "training", step: int = 1000) -> Heartbeat:
        """This process is a rank."""
        heart = Heartbeat(self.run_dir, 0)
        heart.begin_step(step, step)
        heart.enter(phase)
        return heart

    def beat_elsewhere(self, phase: Phase, step: int, time: float = NOW) -> None:
        """A rank whose process is none of this machine's."""
        (self.run_dir / "heartbeat").mkdir(exist_ok=True)
        file = self.run_dir / "heartbeat" / "rank_00000"
        file.write_text(f"9 {time} 1 {step} {step} {phase}")
        os.utime(file, (max(NOW, time), max(NOW, time)))

    def look(self, later: float = 0.0) -> Status:
        return figures.look(self.run_dir, NOW + later)

    def problems(self, later: float = 0.0) -> list[str]:
        return [problem.text for problem in self.look(later).problems]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def working(files: Files) -> Files:
    """A run that is well: a thousand steps, the newest checkpoint fifty steps ago."""
    files.train(1000)
    files.note("start", 10_000, 0)
    files.save(950)
    files.note("save", 500, 950)
    files.beat()
    return files


@pytest.fixture
def asleep() -> Iterator[subprocess.Popen[bytes]]:
    """Some process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


# --- the end of the records


@pytest.mark.parametrize("block", [7, 64, 1000, 1 << 18])
def test_the_newest_records_are_those_of_the_whole_file(
    files: Files, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_tail, "_BLOCK", block)
    files.train(30)
    file = files.run_dir / "metrics.jsonl"
    everything = list(read_metrics(file))
    for count in (1, 2, 29, 30, 31, 1000):
        assert metrics_tail.newest(files.run_dir, count) == everything[-count:]
    with file.open("a") as records:
        records.write('{"step": 31, "time": 1')  # a crash
    assert metrics_tail.newest(files.run_dir, 3) == everything[-3:]
    file.write_text("")
    assert metrics_tail.newest(files.run_dir, 3) == []
    file.unlink()
    assert metrics_tail.newest(files.run_dir, 3) == []


def test_there_is_a_bound_to_what_is_read(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_tail, "_BLOCK", 1000)
    monkeypatch.setattr(metrics_tail, "_MAX_BYTES", 3000)
    files.train(1000)
    assert 10 < len(metrics_tail.newest(files.run_dir, 1000)) < 100


@pytest.mark.parametrize("block", [16, 1 << 18])
def test_the_records_before_any_moment_are_found(files: Files, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among lines of all lengths, some cut, some of an older version without a time."""
    monkeypatch.setattr(metrics_tail, "_BLOCK", block)
    lines, known = [], []
    for step in range(1, 61):
        record = {"step": step, "time": float(step), "samples/0": "x" * (step * 37 % 200)}
        if step % 11 == 0:
            del record["time"]
        lines.append(json.dumps(record) + "\n")
        known.append(record)
        if step % 13 == 0:
            lines.append('{"step": 5, "ti\n')
    (files.run_dir / "metrics.jsonl").write_text("".join(lines) + '{"step": 61, "time": 61')
    for moment in [0.0, 0.5, 1.0, 1.5, *(float(step) for step in range(2, 61) if step % 11), 60.5, 99.0]:
        wanted = [record for record in known if record.get("time", 0.0) < moment and record["step"] < moment]
        found = metrics_tail.before(files.run_dir, moment, 1000)
        assert [record for record in found if "time" in record] == [record for record in wanted if "time" in record]
        assert metrics_tail.before(files.run_dir, moment, 5)[-1:] == found[-1:]


def test_a_large_file_is_not_read(files: Files) -> None:
    files.train(60_000, **{f"scalar/{number}": number / 7 for number in range(10)})
    size = (files.run_dir / "metrics.jsonl").stat().st_size
    before = _bytes_read()
    status = files.look()
    assert (status.progress.step, status.loss.train_day_before is not None) == (60_000, True)
    assert _bytes_read() - before < 0.1 * size


def _bytes_read() -> int:
    """By this process, as the kernel counts."""
    return int(Path("/proc/self/io").read_text().split()[1])


# --- the state


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        ("starting", "starting"),
        ("training", "running"),
        ("evaluating", "evaluating"),
        ("saving", "saving"),
        ("finishing", "finishing"),
    ],
)
def test_a_rank_tells_what_it_is_at(working: Files, phase: Phase, state: str) -> None:
    working.beat(phase)
    status = working.look()
    assert (status.state, status.healthy, status.problems) == (state, True, [])


@pytest.mark.parametrize(
    ("step_seconds", "phase", "patience"),
    [
        (10.0, "training", 300.0),  # supervisor.hang_seconds
        (60.0, "training", 1200.0),  # 20 times a step: supervisor.hang_factor
        (10.0, "evaluating", 2700.0),  # supervisor.patience_minutes
    ],
)
def test_silence_is_a_hang_after_as_long_as_the_watchdog_waits(
    working: Files, step_seconds: float, phase: Phase, patience: float
) -> None:
    working.train(1000, step_seconds)
    working.beat(phase)
    waited = time.time() - NOW
    assert working.look(waited + patience - 5).healthy
    status = working.look(waited + patience + 5)
    assert (status.state, status.healthy) == ("hung?", False)
    assert status.state_text is not None
    assert f"in step 1,000 ({phase})" in status.state_text
    assert [problem.kind for problem in status.problems] == ["hang"]


def test_the_first_step_of_a_start_may_take_long(working: Files) -> None:
    working.note("start", 20, 999)
    waited = time.time() - NOW
    assert working.look(waited + 2600).state == "running"
    assert working.look(waited + 2800).state == "hung?"


def test_a_process_that_has_only_been_given_a_ranks_number_is_none(working: Files) -> None:
    """This process is there, but began after that beat."""
    long_ago = psutil.Process().create_time() - 60
    (working.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {long_ago} {os.getpid()} 1000 1000 training")
    assert working.look().state == "dead"


def test_a_killed_rank_leaves_a_dead_run(files: Files, asleep: subprocess.Popen[bytes]) -> None:
    files.train(1000)
    files.note("start", 10_000, 0)
    files.save(950)
    (files.run_dir / "heartbeat").mkdir()
    (files.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {time.time()} {asleep.pid} 1000 1000 training")
    assert files.look().state == "running"
    os.kill(asleep.pid, signal.SIGKILL)
    os.waitid(os.P_PID, asleep.pid, os.WEXITED | os.WNOWAIT)  # a zombie now, whose number is still its own
    status = files.look()
    assert (status.state, status.healthy) == ("dead", False)
    assert [problem.text for problem in status.problems] == [
        "no process of it is left; go on with ./launch.sh resume test"
    ]
    files.note("crash", 0, 1000, "rank 0: RuntimeError: out of memory")
    assert files.problems() == ["rank 0: RuntimeError: out of memory; go on with ./launch.sh resume test"]


@pytest.mark.parametrize(
    ("kind", "state", "healthy"),
    [
        ("done", "finished", True),
        ("stop", "stopped", True),
        ("mistake", "mistake", False),
        ("gave_up", "gave up", False),
    ],
)
def test_the_last_word_of_a_run_counts(files: Files, kind: str, state: str, healthy: bool) -> None:
    files.train(1000)
    files.note("start", 10_000, 0)
    files.note(kind, 9 * DAY, 1000)
    files.note("save_failed", 9 * DAY, 900)  # nobody has to be told of it any more
    status = files.look()
    assert (status.state, status.healthy) == (state, healthy)
    assert status.finish_time is None
    files.note("start", 50, 1000)
    assert files.look().state == "dead"  # it went on, and has said nothing since


def test_a_run_of_which_there_is_nothing_but_its_settings(files: Files) -> None:
    status = files.look()
    assert (status.state, status.progress.step, status.checkpoint) == ("dead", 0, None)
    assert "checkpoint  none yet" in screen(status)


def test_a_supervisor_that_waits_is_well_until_its_time_is_over(files: Files) -> None:
    files.train(1000)
    for kind, ago in (("launch", 100), ("start", 90), ("crash", 9)):
        files.note(kind, ago, 0)
    files.supervise("waiting", next_start=NOW + 300)
    status = files.look()
    assert (status.state, status.healthy) == ("waiting", True)
    assert "next start  in 5m" in screen(status)
    assert files.look(later=350).healthy
    assert files.problems(later=420) == ["it should have been started again 2m ago"]


def test_a_supervisor_without_ranks_is_starting_them_for_a_while(files: Files) -> None:
    files.supervise("running")
    files.note("launch", 0)
    assert files.look(later=2600).state == "starting"
    assert files.problems(later=2800) == ["no rank has begun for 46m 40s"]


def test_a_supervisor_has_a_moment_to_take_note_of_a_death(files: Files, asleep: subprocess.Popen[bytes]) -> None:
    """As long as stop_seconds, and a minute."""
    files.supervise("running")
    files.note("launch", 5000)
    files.note("start", 4900, 0)
    (files.run_dir / "heartbeat").mkdir()
    (files.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {NOW} {asleep.pid} 1000 1000 training")
    asleep.kill()
    asleep.wait()
    assert files.look(later=170).state == "waiting"
    assert files.look(later=190).state == "hung?"
    files.note("done", 0)
    assert files.look(later=190).state == "finished"


@pytest.mark.parametrize(
    ("code", "before", "state"),
    [
        (0, "start", "finished"),
        (3, "restart", "stopped"),  # asked to stop while it waited
        (2, "launch", "mistake"),
        (1, "launch", "stopped"),  # asked to stop before there was anything to save
        (1, "start", "dead"),  # asked to stop, and could not save
    ],
)
def test_a_supervisor_that_has_ended_has_said_how(files: Files, code: int, before: str, state: str) -> None:
    files.note(before, 60, 0)
    files.supervise("ended", code=code)
    assert files.look().state == state


def test_what_an_earlier_supervisor_said_is_not_of_a_later_start(files: Files) -> None:
    files.supervise("ended", code=3)
    later = time.time() - NOW + 60  # it was written just now, however long this module is imported
    files.note("start", -later, 0)
    assert files.look(later + 60).state == "dead"


def test_a_supervisor_that_was_killed_is_no_stop_on_request(files: Files, asleep: subprocess.Popen[bytes]) -> None:
    """The ranks save and end when it is gone, as if they had been asked to."""
    files.train(1000)
    files.supervise("running", asleep.pid)
    for kind, ago in (("launch", 100), ("start", 90), ("stop", 0)):
        files.note(kind, ago, 0)
    assert files.look().state == "stopped"  # it is about to end, too
    asleep.kill()
    asleep.wait()
    status = files.look()
    assert (status.state, status.healthy) == ("dead", False)
    assert status.state_text == "the supervisor was killed; the ranks have saved and ended"
    files.note("start", 0, 0)  # again, without a supervisor
    files.note("stop", 0, 1000)
    assert files.look().state == "stopped"


def test_ranks_on_another_machine_are_taken_at_their_word(working: Files, asleep: subprocess.Popen[bytes]) -> None:
    asleep.kill()
    asleep.wait()
    (working.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {NOW} {asleep.pid} 1000 1000 training")
    assert working.look().state == "dead"
    os.utime(working.run_dir / "heartbeat" / "rank_00000", (NOW, NOW))
    (working.folder / "checkpoints" / "test" / LOCK).write_text(f"{asleep.pid} on elsewhere\n")
    assert working.look(later=200).state == "running"
    assert working.look(later=400).state == "dead"


@pytest.fixture
def elsewhere(working: Files) -> Files:
    """A run whose ranks are on another machine; its directory is shared. Their process numbers mean nothing here."""
    (working.folder / "checkpoints" / "test" / LOCK).write_text("1 on elsewhere\n")
    working.beat_elsewhere("training", 1000)
    return working


@pytest.mark.parametrize(
    ("kind", "state", "healthy"),
    [
        ("stop", "stopped", True),
        ("done", "finished", True),
        ("crash", "dead", False),
        ("hang", "dead", False),
        ("mistake", "mistake", False),
        ("gave_up", "gave up", False),
    ],
)
def test_an_end_on_another_machine_counts_at_once(elsewhere: Files, kind: str, state: str, healthy: bool) -> None:
    """Not only when the last sign of life, a moment ago, is older than a rank may be silent."""
    elsewhere.beat_elsewhere("finishing", 1000)
    assert elsewhere.look().state == "finishing"
    elsewhere.note(kind, 0, 1000)
    status = elsewhere.look(later=1)
    assert (status.state, status.healthy) == (state, healthy)
    assert (status.beat_age_seconds, status.finish_time) == (None, None)


@pytest.mark.parametrize("clock", [-3 * HOUR, 3 * HOUR])
def test_an_end_on_another_machine_is_not_judged_by_its_clock(elsewhere: Files, clock: float) -> None:
    elsewhere.beat_elsewhere("finishing", 1000, NOW + clock)
    elsewhere.note("stop", -clock, 1000)
    assert elsewhere.look(later=1).state == "stopped"


def test_a_supervisor_on_another_machine_that_has_ended_has_said_how(elsewhere: Files) -> None:
    elsewhere.supervise("running", host="elsewhere")
    for kind, ago in (("launch", 90), ("start", 80), ("stop", 1)):
        elsewhere.note(kind, ago, 1000)
    assert elsewhere.look().state == "stopped"
    elsewhere.supervise("ended", host="elsewhere", code=3)
    assert elsewhere.look().state == "stopped"


def test_a_start_by_hand_on_another_machine_is_seen_before_it_trains(elsewhere: Files) -> None:
    elsewhere.note("stop", 60, 1000)
    elsewhere.beat_elsewhere("starting", 0)
    assert elsewhere.look().state == "starting"
    elsewhere.note("start", 0, 1000)
    elsewhere.beat_elsewhere("training", 1001)
    assert elsewhere.look().state == "running"


def test_a_slow_clock_of_another_machine_does_not_make_it_dead(elsewhere: Files) -> None:
    """The time of the file is that of the machine that keeps it."""
    elsewhere.beat_elsewhere("training", 1000, NOW - 3 * HOUR)
    status = elsewhere.look()
    assert status.state == "running"
    assert status.beat_age_seconds is not None and status.beat_age_seconds < 600
    os.utime(elsewhere.run_dir / "heartbeat" / "rank_00000", (NOW - 3 * HOUR, NOW - 3 * HOUR))
    assert elsewhere.look().state == "dead"


def test_the_rank_that_hangs_is_named(working: Files) -> None:
    """The others are in a phase that may take longer, or have waited less."""
    working.beat("saving")
    Heartbeat(working.run_dir, 1).begin_step(1000, 1000)
    time.sleep(0.01)
    Heartbeat(working.run_dir, 2).begin_step(1000, 1000)
    beat = read_beat(working.run_dir, 1)
    assert beat is not None
    status = working.look(later=beat.time - NOW + 400.5)
    assert (status.state, status.state_text) == ("hung?", "rank 1 has not moved for 6m 40s in step 1,000 (training)")


# --- what is wrong


def test_a_save_that_failed_is_a_problem_until_one_succeeds(working: Files) -> None:
    working.note("save_failed", 60, 1000)
    assert working.problems() == ["step 1,000 could not be saved"]
    working.note("save", 30, 1000)
    assert working.look().healthy


def test_backups_that_fail_are_a_problem_until_one_is_made(working: Files) -> None:
    working.note("backup_failed", 3600, text="could not copy rolling_step_000950: no such bucket")
    assert working.look().healthy, "a run that wants no backups"
    backup = "backup: {to: 's3://nobucket/x'}, dir:"
    working.configure(CONFIG.replace("dir: FOLDER/checkpoints", f"{backup} FOLDER/checkpoints"))
    since = clock(NOW - 3600)
    assert working.problems() == [f"no backups since {since}: could not copy rolling_step_000950: no such bucket"]
    assert [problem.kind for problem in working.look().problems] == ["backup_failed"]
    working.note("backup_ok", 60, 1000)
    assert working.look().healthy


def test_a_finished_run_whose_last_checkpoint_was_not_copied_is_a_problem(files: Files) -> None:
    files.configure(CONFIG.replace("dir: FOLDER/checkpoints", "backup: {to: /nas}, dir: FOLDER/checkpoints"))
    files.train(10)
    files.note("start", 100, 0)
    files.note("backup_failed", 20, 10, "rolling_step_000010 could not be copied before the end of the run")
    files.note("done", 10, 10)
    status = files.look()
    assert (status.state, status.healthy) == ("finished", False)
    assert "could not be copied before the end of the run" in status.problems[0].text


def test_messages_that_are_not_delivered_are_a_problem_until_one_is(working: Files) -> None:
    working.note("alert", 60, text="the command did not take 'test: crash' (exit status 1): it is tried again")
    (problem,) = working.look().problems
    assert problem.kind == "alert"
    assert problem.text.startswith(f"messages are not delivered since {clock(NOW - 60)}: the command did not take")
    event = {"time": NOW - 30, "kind": "alert", "step": None, "text": "told it", "facts": {"by": ["the command"]}}
    with (working.run_dir / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(event) + "\n")
    assert working.look().healthy


@pytest.mark.parametrize("kind", ["done", "stop"])
def test_messages_that_were_not_delivered_before_the_end_are_a_problem_of_an_ended_run(files: Files, kind: str) -> None:
    files.train(10)
    files.note("start", 100, 0)
    files.note(kind, 20, 10)
    text = "2 messages were not delivered: the command failed with exit status 7"
    for channel in (text, "1 message was not delivered: address 1 failed (no connection)"):
        files.note("alert", 10, text=channel, facts={"undelivered": 2})
    assert not files.look().healthy
    assert files.problems() == [f"{text}; 1 message was not delivered: address 1 failed (no connection)"]
    files.note("alert", 5, text="told test: finished", facts={"by": ["the command"]})
    assert files.look().healthy


def test_checkpoints_that_do_not_come_are_a_problem(working: Files) -> None:
    """By steps: three times checkpoint.every."""
    working.train(1250)
    working.beat(step=1251)
    assert working.look().healthy
    working.train(1251)
    working.beat(step=1252)
    assert working.problems() == ["no checkpoint for 301 steps, one is due every 100"]
    working.configure(CONFIG.replace("every: 100", "every: 0"))
    assert working.look().healthy


def test_a_newest_checkpoint_that_is_damaged_is_a_problem(working: Files) -> None:
    newest = scan(working.folder / "checkpoints" / "test")[0].path
    (newest / "model.pt").write_bytes(bytes(999))
    assert working.problems() == ["rolling_step_000950 is damaged: model.pt has 999 bytes, 1000 were written"]
    (newest / "manifest.json").write_text("{}")
    assert "rolling_step_000950 is damaged: manifest.json is damaged" in working.problems()[0]
    assert "sizes right" not in screen(working.look())


@pytest.mark.parametrize("kind", ["divergence", "skipped_run", "frozen", "drift", "stuck_data", "rollback"])
def test_an_incident_is_a_problem_until_a_later_step_is_saved(working: Files, kind: str) -> None:
    working.note("save", 200, 1000)  # before it went back
    working.note(kind, 100, 990, "it went wrong")
    assert working.problems() == ["it went wrong; no later step has been saved"]
    working.note("save", 90, 990)  # not a later one
    assert not working.look().healthy
    assert working.look(later=DAY).state == "hung?"
    working.beat()
    working.note("save", 80, 1000)
    assert working.look().healthy


def test_an_incident_of_long_ago_is_none(working: Files) -> None:
    working.note("divergence", DAY + 60, 990)
    assert working.look().healthy


@pytest.mark.parametrize("kind", ["spike", "not_finite", "crash"])
def test_what_is_over_at_once_is_counted_only(working: Files, kind: str) -> None:
    working.note(kind, 100, 990)
    status = working.look()
    assert status.healthy
    assert status.history.incidents_24h == {kind: 1}


# --- the disk


Usage = namedtuple("Usage", "total used free")


def _with_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_forecast.shutil, "disk_usage", lambda _: Usage(0, 0, free))


def test_a_disk_that_will_not_do_is_foreseen(working: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps to go, of ten seconds: 2.8 hours. Nine more checkpoints come, and one is being written."""
    settings = load_settings(working.run_dir / "config.yaml")
    written = sum(file.stat().st_size for file in working.run_dir.rglob("*") if file.is_file())
    checkpoint = sum(file.stat().st_size for file in (working.folder / "checkpoints").rglob("*") if file.is_file())
    needed = written + 11 * 1000 - checkpoint + 1000  # as much again; ten, the best one, less what is there; the next
    progress = RunProgress(1000, 2000, 10.0, 0.0)
    for free, enough in ((needed, True), (needed - 2, False)):
        _with_free(free, monkeypatch)
        (found,) = disk_forecast.look(working.run_dir, settings, scan(settings.checkpoint_dir), progress)
        assert (found.free_bytes, found.needed_bytes) == (free, pytest.approx(needed, abs=1))
        assert (found.days_left is None) is enough
    assert found.days_left == pytest.approx(1000 * 10 / DAY, rel=0.01)
    assert "0.1 days left, 0.1 MB free" in screen(working.look())
    assert working.problems() == [f"the disk of {working.run_dir} lasts 0.1 days at what this run writes: 0.1 MB free"]
    working.configure(CONFIG + "alerts: {disk_days: 0.1}\n")
    assert working.look().healthy
    _with_free(10**12, monkeypatch)
    assert "disk        enough to the end, 1.00 TB free" in screen(working.look())


Filesystem = namedtuple("Filesystem", "f_flag f_blocks f_bavail f_files f_favail f_bfree f_frsize", defaults=[9, 9])


@pytest.mark.parametrize(
    ("disk", "problem"),
    [
        (Filesystem(os.ST_RDONLY, 9, 9, 9, 9), "is read-only"),
        (Filesystem(0, 9, 0, 9, 9), "is full"),
        (Filesystem(0, 9, 9, 9, 0), "has no free inodes"),
        (Filesystem(0, 9, 9, 0, 0), None),  # btrfs counts no inodes
        (Filesystem(0, 0, 0, 0, 0), None),  # a file system that counts nothing
    ],
)
def test_a_disk_that_takes_nothing_now_is_a_problem(
    working: Files, monkeypatch: pytest.MonkeyPatch, disk: Filesystem, problem: str | None
) -> None:
    monkeypatch.setattr(disk_forecast.os, "statvfs", lambda _: disk)
    found = [text for text in working.problems() if " lasts " not in text]  # by the free bytes, which are few here
    assert found == ([f"the disk of {working.run_dir} {problem}"] if problem else [])


def test_a_run_that_trains_and_is_not_logged_is_not_healthy(working: Files) -> None:
    working.configure(CONFIG + "supervisor: {hang_seconds: 10000}\n")
    working.beat(step=1050)
    assert working.problems(later=200) == []
    assert "nothing has been logged for 6m 40s: the ranks are at step 1,050, metrics.jsonl ends at step 1,000" in (
        working.problems(later=400)
    )
    working.beat("evaluating", step=1050)
    assert not any("logged" in problem for problem in working.problems(later=400))
    working.beat(step=1002)  # the record of the step before may wait for the next one
    assert not any("logged" in problem for problem in working.problems(later=400))


@pytest.mark.parametrize(("unevaluated", "state"), [(None, "finished"), ({"train/loss": 2.0}, "dead")])
def test_a_run_whose_end_is_saved_and_evaluated_is_finished_though_its_journal_was_not_written(
    working: Files, unevaluated: dict[str, float] | None, state: str
) -> None:
    working.save(2000, state={"unevaluated": unevaluated})
    (working.run_dir / "heartbeat" / "rank_00000").unlink()
    assert working.look().state == state


def test_a_finished_run_whose_last_checkpoint_is_damaged_or_gone_is_not_healthy(working: Files) -> None:
    last = working.save(2000)
    working.note("save", 10, 2000)
    working.note("done", 5, 2000)
    (working.run_dir / "heartbeat" / "rank_00000").unlink()
    assert (working.look().state, working.problems()) == ("finished", [])
    (last / "model.pt").write_bytes(b"short")
    assert working.problems() == ["rolling_step_002000 is damaged: model.pt has 5 bytes, 1000 were written"]
    shutil.rmtree(last)
    (problem,) = working.problems()
    assert problem.startswith("the last checkpoint, of step 2,000, is not in ")


def test_each_of_two_disks_has_a_line(working: Files) -> None:
    status = working.look()
    (disk,) = status.disks
    assert {Path(name).parent.name for name in disk.directories} == {"runs", "checkpoints"}
    other = replace(disk, directories=disk.directories[1:], days_left=3.25)
    lines = screen(replace(status, disks=[disk, other])).splitlines()
    assert lines[-2].startswith("runs        enough to the end, ")
    assert lines[-1].startswith("checkpoints 3.2 days left, ")


def test_before_the_first_checkpoint_the_free_space_alone_is_told(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.train(50)
    files.beat(step=51)
    _with_free(10**9, monkeypatch)
    (found,) = files.look().disks
    assert (found.free_bytes, found.needed_bytes, found.days_left) == (10**9, None, None)


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"keep_last": 3}, 3 + 1 + 1),
        ({"keep_last": 30}, 11 + 1 + 1),  # there are no more saves than ten
        ({"keep_last": 3, "keep_best": False}, 3 + 1),
        ({"keep_last": 3, "keep_every": 500}, 3 + 4 + 1 + 1),
        ({"keep_last": 3, "keep_every": 150}, 3 + 6 + 1 + 1),  # each third hundred
        ({"keep_last": 3, "every": 0}, 2 + 1 + 1),  # that at the end
    ],
)
def test_checkpoints_grow_to_what_retention_keeps(working: Files, changes: dict[str, Any], checkpoints: int) -> None:
    settings = load_settings(working.run_dir / "config.yaml").checkpoint.model_copy(update=changes)
    found = scan(working.folder / "checkpoints" / "test")
    growth = disk_forecast.of_checkpoints(settings, found, 1000, 0, RunProgress(1000, 2000, 10.0, 0.0))
    assert growth(2000) == 1000 * checkpoints
    assert growth(1000) <= growth(1500) <= growth(2000)
    more_than_is_kept = disk_forecast.of_checkpoints(settings, found, 1000, 10**9, RunProgress(1000, 2000, 10.0, 0.0))
    assert more_than_is_kept(2000) == 1000  # the one that is written before others go


def test_epochs_come_on_top(working: Files) -> None:
    settings = load_settings(working.run_dir / "config.yaml").checkpoint
    found, progress = scan(working.folder / "checkpoints" / "test"), RunProgress(1000, 2000, 10.0, 1 / 300)
    plain = disk_forecast.of_checkpoints(settings, found, 1400, 0, replace(progress, epochs_per_step=0.0))(2000)
    for changes, more in (({}, 3 * 1400), ({"keep_epochs": 2}, 2 * 1400), ({"epochs_as": "weights"}, 3 * 400)):
        growth = disk_forecast.of_checkpoints(settings.model_copy(update=changes), found, 1400, 0, progress)
        assert growth(2000) - plain == pytest.approx(more)


# --- pace, loss, time


def test_what_is_left_follows_from_the_pace(working: Files) -> None:
    status = working.look()
    assert (status.progress.steps, status.progress.done_share) == (2000, 0.5)
    assert status.progress.left_seconds == pytest.approx(10_000)
    assert status.finish_time == pytest.approx(NOW + 10_000)
    text = screen(status)
    assert "step        1,000 of 2,000, 50.0%" in text
    assert "left        2h 46m" in text


def test_the_steps_that_a_start_has_planned_count_where_epochs_are_set(files: Files) -> None:
    """Batches that were left out make epochs pass faster than steps."""
    files.configure(CONFIG.replace("steps: 2000", "epochs: 3"))
    files.train(50, **{"train/epoch": 0.26})
    (files.run_dir / "starts.jsonl").write_text('{"from_step": 0, "steps": 600}\n')
    assert files.look().progress.steps == 600


def test_settings_that_were_edited_after_the_last_start_do_not_count_yet(files: Files) -> None:
    files.train(500)
    (files.run_dir / "starts.jsonl").write_text('{"from_step": 0, "steps": 500}\n')
    assert "step        500 of 500, 100.0%" in screen(files.look())


def test_a_run_is_not_all_done_before_its_last_step(working: Files) -> None:
    working.train(1999)
    assert "step        1,999 of 2,000, 99.9%" in screen(working.look())
    assert " 99% " in line(working.look())
    working.train(2000)
    assert "step        2,000 of 2,000, 100.0%" in screen(working.look())


def test_steps_follow_from_epochs(files: Files) -> None:
    files.configure(CONFIG.replace("steps: 2000", "epochs: 3"))
    settings = load_settings(files.run_dir / "config.yaml")
    assert total_steps(settings.schedule, None, epochs_per_step([])) is None
    recorded = epochs_per_step([{"step": 50, "train/epoch": 0.25}, {"step": 51}])
    assert total_steps(settings.schedule, None, recorded) == 600
    assert files.look().progress.done_share is None


def test_a_rank_may_be_further_than_the_records(working: Files) -> None:
    """As on a full disk."""
    working.beat(step=1101)
    assert working.look().progress.step == 1100


def test_losses_are_medians_of_some_records(files: Files) -> None:
    files.train(20_000)
    records = list(read_metrics(files.run_dir / "metrics.jsonl"))
    losses = [record["train/loss"] for record in records]
    status = files.look()
    assert status.loss.train == statistics.median(losses[-50:])
    assert status.loss.train_day_before == statistics.median(losses[-8640 - 1 - 50 : -8640 - 1])
    assert (status.loss.val, status.loss.val_step, status.loss.reference) == (None, None, None)
    assert "loss        10.1234 (median of last 50 steps)" in screen(
        replace(status, loss=replace(status.loss, train=10.1234))
    )
    files.save(19_000)
    assert (files.look().loss.val, files.look().loss.val_step) == (5.5, 18_999)  # what it remembers


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_neither_the_newest_nor_the_best(files: Files, bad: float) -> None:
    """Also where a checkpoint of an earlier version has it for the best."""
    files.train(20)
    state = {"val_loss": bad, "val_step": 949, "best_val_loss": bad, "best_step": 949}
    files.save(950, state=state)
    assert files.look().loss.val is files.look().loss.best_val is None
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        for step, value in ((951, 3.5), (952, 4.0), (953, None)):
            records.write(json.dumps({"step": step, "time": NOW, "val/loss": value}) + "\n")
    loss = files.look().loss
    assert (loss.val, loss.val_step, loss.best_val, loss.best_val_step) == (4.0, 952, 3.5, 951)
    text = screen(files.look())
    assert "validation  not finite at step 953\n  finite    4.0000 at step 952\n  best      3.5000 at step 951" in text


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])  # None: as the monitor writes them
def test_a_newest_loss_that_is_not_finite_is_a_problem_at_work_and_at_the_end(files: Files, bad: float | None) -> None:
    files.train(1, **{"val/loss": 10.9})
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        for step in range(2, 7):
            records.write(json.dumps({"step": step, "time": NOW, "train/loss": bad, "val/loss": bad}) + "\n")
    files.note("start", 100, 0)
    problems = [
        "the newest training loss is NaN or infinite (step 6)",
        "the newest validation loss is NaN or infinite (step 6)",
    ]
    files.beat(step=7)
    assert files.problems() == problems
    (files.run_dir / "heartbeat" / "rank_00000").unlink()
    files.note("done", 10, 6)
    status = files.look()
    assert (status.state, status.healthy) == ("finished", False)
    assert [problem.text for problem in status.problems] == problems
    assert "loss        not finite at step 6\n  finite    9.9990 (median of last 50 steps)" in screen(status)
    assert line(status).split() == ["!", "test", "finished", "0%", "NaN"]
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        records.write(json.dumps({"step": 7, "time": NOW, "train/loss": 3.0, "val/loss": 3.0}) + "\n")
    assert files.look().healthy


def test_the_reference_is_for_runs_that_are_like_it(files: Files) -> None:
    like = load_settings(files.run_dir / "config.yaml", {"model.preset": "124M"})
    for step, loss in REFERENCE_CURVE.items():
        assert reference_loss(like, step) == pytest.approx(loss)
    between = reference_loss(like, 12_000)
    assert between is not None
    assert 3.315 < between < (3.392 + 3.315) / 2
    assert between == pytest.approx(3.392 + (3.315 - 3.392) * math.log(1.2) / math.log(1.4))
    assert (reference_loss(like, 1999), reference_loss(like, 18_001)) == (None, None)
    smaller = load_settings(files.run_dir / "config.yaml", {"model.preset": "350M"})
    other_budget = load_settings(
        files.run_dir / "config.yaml", {"model.preset": "124M", "batch.tokens_per_step": "65536"}
    )
    assert reference_loss(smaller, 4000) is reference_loss(other_budget, 4000) is None


def test_it_is_shown_where_there_is_one(files: Files) -> None:
    files.configure(CONFIG.replace("7M", "124M"))
    files.train(4000)
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        records.write(json.dumps({"step": 4001, "time": NOW, "val/loss": 3.7}) + "\n")
    text = screen(files.look())
    assert "validation  3.7000 at step 4,001" in text
    assert "llm.c       3.6179 there: +0.0821" in text


def test_lost_time_is_work_done_again_and_time_that_nobody_worked(files: Files) -> None:
    """Saved at step 100, crashed 10 minutes later, started again after 5 more. A day ago too, in part."""
    files.note("start", 2 * DAY, 0)
    for ago, step in ((DAY, 100), (HOUR, 200)):
        files.note("save", ago + 450, step)
        files.note("crash", ago - 150, step + 60)
        files.note("start", ago - 450, step)
    files.beat(step=200)
    past = files.look().history
    assert (past.starts, past.incidents, past.incidents_24h) == (3, 2, {"crash": 2})
    assert (past.lost_seconds, past.lost_seconds_24h) == (pytest.approx(1800), pytest.approx(1350))
    assert past.kept_share == pytest.approx(1 - 1800 / (2 * DAY))
    assert past.kept_share_24h == pytest.approx(1 - 1350 / DAY)
    assert (past.read_back_step, past.read_back_time) == (200, pytest.approx(NOW - HOUR + 450))


LAUNCHES = [
    # by hand, restarted twice, of which the first got nowhere, stopped, by hand, by hand without a supervisor
    [("launch", False), ("start", None), ("crash", None), ("restart", None), ("launch", True), ("crash", None)],
    [("restart", None), ("launch", True), ("start", None), ("stop", None), ("launch", False), ("start", None)],
    [("stop", None), ("start", None)],
    # by hand, and where that got nowhere once more by the supervisor: somebody resumed it
    [("stop", None), ("launch", False), ("crash", None), ("restart", None), ("launch", True), ("start", None)],
    # a supervisor that was killed while it waited does not restart
    [("crash", None), ("restart", None), ("launch", False), ("start", None)],
]


@pytest.mark.parametrize("told", [True, False])
def test_restarts_by_the_supervisor_are_counted_apart_from_resumes_by_hand(files: Files, told: bool) -> None:
    """Journals of earlier versions do not say who launches: there a launch after a restart is a supervisor's own."""
    groups = LAUNCHES if told else LAUNCHES[:-1]
    for number, (kind, restart) in enumerate(itertools.chain(*groups)):
        facts = {"restart": restart} if told and restart is not None else {}
        files.note(kind, 9000 - 60 * number, number if kind == "start" else None, facts=facts)
    history, resumes = files.look().history, 4 if told else 3
    assert (history.starts, history.restarts, history.resumes) == (resumes + 2, 1, resumes)
    assert f"restarts    1 by the supervisor, {resumes} by hand" in screen(files.look())


def test_goodput_is_what_is_recorded(files: Files) -> None:
    """Of two days in which half the time went into steps, and three quarters on the second day."""
    starts = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(NOW - 2 * DAY)), "from_step": 0}
    (files.run_dir / "starts.jsonl").write_text(json.dumps(starts) + "\n")
    records = [(1, NOW - DAY - 1, 0.25), (2, NOW, 0.5)]
    text = "".join(json.dumps({"step": s, "time": t, "perf/goodput": share}) + "\n" for s, t, share in records)
    (files.run_dir / "metrics.jsonl").write_text(text)
    history = files.look().history
    assert (history.goodput, history.goodput_24h) == (0.5, pytest.approx(0.75, abs=1e-4))
    assert "goodput     50.0%, in 24 h 75.0%" in screen(files.look())


def test_a_run_that_does_not_go_on_loses_time(files: Files) -> None:
    files.note("start", 5 * HOUR, 0)
    files.note("save", HOUR, 100)
    assert files.look().state == "dead"
    assert files.look().history.lost_seconds == pytest.approx(HOUR)
    assert files.look().history.kept_share == pytest.approx(0.8)


def test_a_run_that_is_not_wanted_loses_nothing(files: Files) -> None:
    files.note("start", 5 * HOUR, 0)
    files.note("save", 4 * HOUR, 100)
    files.note("stop", 4 * HOUR, 100)
    assert (files.look().history.lost_seconds, files.look().history.kept_share) == (0.0, 1.0)
    files.note("start", HOUR, 100)
    files.beat(step=101)
    assert (files.look().history.lost_seconds, files.look().history.kept_share) == (0.0, 1.0)


def test_of_a_long_journal_the_end_is_read(working: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BYTES", 1 << 20)
    for number in range(14_000):
        working.note("spike", 9 * DAY - number, number)
    working.note("spike", 60, 990)
    status = working.look()
    assert (working.run_dir / "journal.jsonl").stat().st_size > 1 << 20
    assert 1000 < status.history.incidents < 14_000
    assert status.history.incidents_24h == {"spike": 1}


def test_gpus_are_told_where_they_are_recorded(working: Files) -> None:
    assert working.look().gpus is None
    working.train(1000, **{"perf/gpu_temperature_c": 71.0, "perf/gpu_throttled": 2.0})
    assert "GPU         71 °C, 2 throttled" in screen(working.look())


# --- real runs


def test_a_real_run_on_four_ranks_is_told_as_it_was(four_ranks: Run) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    status = figures.look(run_dir, time.time())
    assert (status.state, status.healthy, status.problems) == ("finished", True, [])
    assert (status.progress.step, status.progress.steps, status.progress.done_share) == (12, 12, 1.0)
    assert status.loss.train == pytest.approx(statistics.median(record["train/loss"] for record in records))
    assert (status.loss.val, status.loss.val_step) == (records[-1]["val/loss"], 12)
    assert status.checkpoint is not None
    assert (status.checkpoint.tag, status.checkpoint.damage) == ("rolling_step_000012", None)
    assert (status.history.starts, status.history.lost_seconds, status.history.incidents) == (1, 0.0, 0)
    assert status.history.read_back_step is None
    assert [found.needed_bytes is not None for found in status.disks]


def test_a_real_rank_is_running_until_it_is_killed(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    schedule = {"steps": 1_000_000, "warmup_steps": 3}
    config = write_config(tmp_path, schedule=schedule, samples={"every": 0}, validation={"every": 0})
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "output").open("w") as output:
        rank = subprocess.Popen(
            [sys.executable, str(TRAIN), "--config", str(config)],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(lambda: (tmp_path / "runs" / "test" / "config.yaml").exists())
        _wait_for(lambda: _state(tmp_path) in ("running", "saving", "evaluating"))
        assert figures.look(tmp_path / "runs" / "test", time.time()).healthy
    finally:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    assert _state(tmp_path) == "dead"


def _state(folder: Path) -> str:
    return figures.look(folder / "runs" / "test", time.time()).state


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# --- the screen


def test_the_screen_fits_a_phone_whatever_there_is_to_tell(working: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gpt2-124m-fineweb-edu-five-epochs-second-attempt"
    working.run_dir = working.run_dir.rename(working.run_dir.with_name(name))
    working.configure(CONFIG.replace("7M", "124M").replace("2000", "100000"))
    gpus = {"perf/gpu_temperature_c": 71.0, "perf/gpu_throttled": 2.0, "perf/tokens_per_s": 1_178_123.0}
    working.train(12_000, 123.4, **gpus, **{"val/loss": 3.4})
    shutil.move(working.folder / "checkpoints" / "test", working.folder / "checkpoints" / name)
    for kind in ("spike", "divergence", "skipped_run", "not_finite", "hang"):
        working.note(kind, 100, 990, "loss 5.1234 is 93 deviations above the recent 3.1234, the 20th in a row")
    working.note("save_failed", 90, 12_000)
    working.note("start", 80, 11_000)
    working.beat("evaluating", 12_000)
    _with_free(10_000, monkeypatch)
    status = working.look(later=9000)
    assert len(status.problems) == 5
    lines = screen(status).splitlines()
    assert max(map(len, lines)) <= WIDTH == 46
    assert len(screen(replace(status, problems=[])).splitlines()) <= 25
    assert lines[0].startswith("gpt2-124m-fineweb-...: hung?  ")
    assert len(line(status)) <= WIDTH


def test_a_finished_run_whose_checkpoints_are_gone_needs_attention(files: Files) -> None:
    files.train(1000)
    files.note("save", 60, 1000)
    files.note("done", 50, 1000)
    assert files.problems() == [f"no checkpoints in {files.folder}/checkpoints/test, though some were saved"]


def test_colours_are_for_terminals(working: Files) -> None:
    plain, coloured = screen(working.look()), screen(working.look(), coloured=True)
    assert "\033" not in plain
    assert coloured.replace("\033[32m", "").replace("\033[0m", "") == plain
    assert coloured.startswith("test: \033[32mrunning\033[0m ")
    working.note("save_failed", 60, 1000)
    assert "\033[31m! step 1,000 could not be saved\033[0m" in screen(working.look(), coloured=True)


def test_a_line_for_each_of_several_runs(working: Files) -> None:
    assert line(working.look()) == "  test         running     50%  9.024  2h 46m"
    working.note("save_failed", 60, 1000)
    assert line(working.look()).startswith("! test ")
