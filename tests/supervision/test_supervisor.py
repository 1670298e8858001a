"""A run that is kept going: real ranks, real signals, every way in which a supervisor's work may end."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from launched import PROJECT, end_session, start

from ds_gpt2.checkpoint.catalog import newest_tag, open_generation, scan
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.run_dir.stop_request import STOP_FILE
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.supervisor import SupervisedRun, supervise
from ds_gpt2.tools.drill import fault_injection
from ds_gpt2.tools.drill.compare import curve_differences
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.status.status import read_status

STEPS = 24
SAVES = ("checkpoint.every=4", "checkpoint.async=false")  # what is saved when a fault strikes does not depend on time
IMPATIENT = {"backoff_seconds": 0, "restarts": 3, "hang_seconds": 6, "hang_factor": 5}
ENDLESS = {"steps": 1_000_000, "warmup_steps": 3}

Configure = Callable[..., Settings]


@pytest.fixture
def configure(tmp_path: Path, write_config: Callable[..., Path]) -> Configure:
    def write(name: str, **sections: object) -> Settings:
        supervisor = {**IMPATIENT, **sections.pop("supervisor", {})}  # type: ignore[dict-item]  # a section
        usual: dict[str, object] = {
            "schedule": {"steps": STEPS, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4},
            "samples": {"every": 0},
            "validation": {"every": 12, "tokens": 640},
        }
        config = write_config(tmp_path / name, **{**usual, **sections, "supervisor": supervisor})
        return load_settings(config, dict(setting.split("=") for setting in SAVES))

    return write


def _run(settings: Settings, *struck: Fault, resume: str | None = None) -> SupervisedRun:
    config = settings.run.dir.parent / "run.yaml"
    arguments = ("--config", str(config), *SAVES)
    return SupervisedRun(
        arguments,
        RankLayout("cpu", 2),
        resume,
        script=fault_injection.SCRIPT,
        environment=fault_injection.request(struck),
    )


def _told(settings: Settings, *but: str) -> list[str]:
    return [event.kind for event in _events(settings) if event.kind not in but]


def _events(settings: Settings) -> list[Event]:
    return list(read_journal(settings.run_dir))


def _left(settings: Settings) -> list[str]:
    """Processes of this test's run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(settings.run.dir.parent) in command and process.status() != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def _until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_run_that_is_killed_frozen_and_crashed_becomes_what_it_would_have_been(
    tmp_path: Path, configure: Configure
) -> None:
    undisturbed, disturbed = configure("undisturbed"), configure("disturbed")
    assert supervise(_run(undisturbed), undisturbed) == exit_report.DONE
    assert _told(undisturbed, "save", "best") == ["launch", "start", "done"]
    struck = [
        Fault("kill", step=6, rank=1, once=str(tmp_path / "killed")),
        Fault("read_error", batch=10, rank=1, once=str(tmp_path / "unreadable")),
        Fault("freeze", step=13, rank=1, once=str(tmp_path / "frozen")),
        Fault("crash", step=19, rank=0, micro_batch=1, once=str(tmp_path / "crashed")),
    ]
    assert supervise(_run(disturbed, *struck), disturbed) == exit_report.DONE
    assert curve_differences(undisturbed.run_dir, disturbed.run_dir) == []
    ends = [generation.manifest for generation in (scan(each.checkpoint_dir)[0] for each in (undisturbed, disturbed))]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].state["ledger"] == ends[1].state["ledger"] != ""
    again = ["restart", "launch", "start"]
    expected = ["launch", "start", "crash", *again, "data_error", "hang", *again, "crash", *again, "done"]
    assert _told(disturbed, "save", "best") == expected
    (unreadable,) = [event.text for event in _events(disturbed) if event.kind == "data_error"]
    assert "rank 1: shard" in unreadable and "cannot be read: Input/output error; retrying in 0.5 s" in unreadable
    killed, hung, crashed = [event for event in _events(disturbed) if event.kind in ("crash", "hang")]
    assert (
        "rank 1 exited without an error message" in killed.text
    )  # its signal, too, where the launcher sees it before the others
    assert (hung.step, "rank 1" in hung.text, "is stopped" in hung.text) == (13, True, True)
    stacks = Path(hung.facts["stacks"])
    assert "in _strike" in (stacks / "rank_00001.txt").read_text(encoding="utf-8")
    assert "State:" in (stacks / "rank_00000.txt").read_text(encoding="utf-8")
    assert "rank 0: RuntimeError: a fault of the drill" in crashed.text and crashed.step == 19
    record = read_supervisor_record(disturbed.run_dir)
    assert record is not None and (record.state, record.code, record.alive) == ("ended", exit_report.DONE, False)
    assert _left(disturbed) == []


def test_a_step_that_always_fails_and_gradients_that_stay_bad_are_got_around(configure: Configure) -> None:
    """First an older checkpoint, then without the data; and back from updates that are skipped one after another."""
    settings = configure("bad", supervisor={"skip_data": True}, guards={"skipped_run_steps": 2})
    bad = [Fault("crash", batch=9, rank=1), *(Fault("nan", batch=batch, micro_batch=1) for batch in (16, 17))]
    assert supervise(_run(settings, *bad), settings) == exit_report.DONE
    launches = [event.text for event in _events(settings) if event.kind == "launch"]
    assert [text.split(", ", 1)[1] for text in launches] == [
        "from the beginning",
        "to go on from auto",
        "to go on from before:8",
        "to go on from auto without batches 9",
        "to go on from before:15 without batches 9,16-17",
    ]
    end = open_generation(settings.checkpoint_dir / str(newest_tag(settings.checkpoint_dir))).manifest
    assert end is not None
    assert (end.step, end.state["batch"], end.state["left_out"]) == (STEPS, STEPS + 3, [9, 16, 17])
    assert end.state["skipped_steps"] == 0  # those were undone
    assert _left(settings) == []


def test_a_run_that_gets_nowhere_is_given_up(configure: Configure) -> None:
    settings = configure("vain", supervisor={"restarts": 1})
    assert supervise(_run(settings, Fault("crash", step=1)), settings) == exit_report.CRASHED
    assert _told(settings) == ["launch", "start", "crash", "restart", "launch", "start", "crash", "gave_up"]
    assert [event.facts["restart"] for event in _events(settings) if event.kind == "launch"] == [False, True]
    history = read_status(settings.run_dir, time.time()).history
    assert (history.starts, history.restarts, history.resumes) == (2, 1, 0)


def test_a_mistake_is_not_tried_again(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    settings = configure("mistake")
    assert supervise(_run(settings, resume="epoch_00009"), settings) == exit_report.MISTAKE
    assert _told(settings) == ["launch", "mistake"]
    assert read_status(settings.run_dir, time.time()).state == "mistake"  # though no rank came so far as to train
    assert "epoch_00009" in capfd.readouterr().err


def test_what_was_right_before_is_nobodys_mistake(configure: Configure, dataset_dir: Path, tmp_path: Path) -> None:
    """The data goes away in the middle of a run, and comes back while it is being started again."""
    data, away = Path(shutil.copytree(dataset_dir, tmp_path / "data")), tmp_path / "elsewhere"
    patient = {"restarts": 30, "backoff_seconds": 1}
    settings = configure("away", data={"dir": str(data)}, supervisor=patient, validation={"every": 0})
    process = _supervisor(settings, [Fault("crash", step=23, rank=1, once=str(tmp_path / "crashed"))])
    try:
        _until(lambda: "save" in _told(settings))
        data.rename(away)  # what is open stays readable
        _until(lambda: "crash" in _told(settings))
        _until(lambda: _told(settings).count("crash") == 2)
        away.rename(data)
        assert process.wait(timeout=600) == exit_report.DONE
    finally:
        end_session(process.pid)
    crashed = [event.text for event in _events(settings) if event.kind == "crash"]
    assert "a fault of the drill" in crashed[0]
    assert f"no data: {data} does not exist" in crashed[1]
    assert "mistake" not in _told(settings)


def _supervisor(settings: Settings, struck: Sequence[Fault] = ()) -> subprocess.Popen[str]:
    """A supervisor in a process of its own."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:4]\n"
        "from pathlib import Path; from ds_gpt2.config.settings import load_settings\n"
        "import test_supervisor as this\n"
        "settings = load_settings(Path(sys.argv[4]), {'checkpoint.every': '4'})\n"
        "struck = [this.Fault(**each) for each in eval(sys.argv[5])]\n"
        "sys.exit(this.supervise(this._run(settings, *struck, resume='auto'), settings))"
    )
    path = [str(Path(__file__).parent), str(PROJECT / "tests"), str(PROJECT)]
    config = settings.run.dir.parent / "run.yaml"
    listed = repr([vars(fault) for fault in struck])
    return start([sys.executable, "-c", program, *path, str(config), listed])


def test_launcher_and_supervisor_may_die(configure: Configure) -> None:
    settings = configure("orphans", schedule=ENDLESS)
    process = _supervisor(settings)
    try:
        _until(lambda: "save" in _told(settings))
        record = read_supervisor_record(settings.run_dir)
        assert record is not None and record.alive and record.group is not None
        psutil.Process(record.group).kill()  # DeepSpeed's launcher: its ranks are asked to save, and started again
        _until(lambda: _told(settings).count("launch") == 2)
        assert "DeepSpeed's launcher has died" in [event.text for event in _events(settings)]
        _until(lambda: _told(settings).count("start") == 2)
        process.kill()  # the supervisor: its ranks save and end by themselves
        process.wait()
        _until(lambda: _told(settings)[-1] == "stop" and not _left(settings))
    finally:
        end_session(process.pid)


def test_a_stop_while_a_shard_cannot_be_read_loses_no_step(configure: Configure) -> None:
    undisturbed, settings = configure("undisturbed"), configure("unreadable")
    process = _supervisor(settings, [Fault("read_error", batch=10, rank=1)])
    try:
        _until(lambda: all((beat := read_beat(settings.run_dir, rank)) and beat.step == 10 for rank in range(2)))
        _until(lambda: "data_error" in _told(settings))
        process.terminate()
        output, _ = process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    assert process.returncode == exit_report.STOPPED, output
    assert newest_tag(settings.checkpoint_dir) == "rolling_step_000009"
    assert supervise(_run(settings, resume="auto"), settings) == exit_report.DONE
    assert supervise(_run(undisturbed), undisturbed) == exit_report.DONE
    assert curve_differences(undisturbed.run_dir, settings.run_dir) == []


def test_a_stop_file_counts_while_the_run_waits_and_while_it_starts(configure: Configure) -> None:
    settings = configure("stopped", supervisor={"backoff_seconds": 600})
    (settings.run_dir).mkdir(parents=True)
    (settings.run_dir / STOP_FILE).touch()  # left from before: it does not count
    process = _supervisor(settings, [Fault("crash", step=6, rank=1)])
    try:
        _until(lambda: "restart" in _told(settings))
        (settings.run_dir / STOP_FILE).touch()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == exit_report.STOPPED, output
        process = _supervisor(settings)
        _until(lambda: _told(settings).count("launch") == 2)
        (settings.run_dir / STOP_FILE).touch()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == exit_report.STOPPED, output
    finally:
        end_session(process.pid)
    assert not (settings.run_dir / STOP_FILE).exists()
    assert newest_tag(settings.checkpoint_dir) == "rolling_step_000004"  # the start from there made no further step


def test_a_run_of_nothing_but_nan_is_not_done(configure: Configure) -> None:
    settings = configure("nan", guards={"skipped_run": "off"}, supervisor={"restarts": 1})
    bad = [Fault("nan", batch=batch, micro_batch=1) for batch in range(1, STEPS + 1)]
    assert supervise(_run(settings, *bad), settings) == exit_report.CRASHED
    assert "done" not in _told(settings) and _told(settings)[-1] == "gave_up"


def test_checkpoints_that_are_away_are_waited_for(configure: Configure) -> None:
    """Also by a supervisor that starts on its own, as after a reboot: the disk may be mounted later."""
    settings = configure("away", schedule=ENDLESS, supervisor={"longest_backoff_seconds": 1})
    process = _supervisor(settings)
    away = settings.checkpoint.dir.with_name("away")
    try:
        _until(lambda: _told(settings).count("save") == 2)
        process.terminate()
        process.communicate(timeout=600)
        steps = [record["step"] for record in read_metrics(settings.run_dir / METRICS)]
        settings.checkpoint.dir.rename(away)
        settings.checkpoint.dir.mkdir()
        process = _supervisor(settings)
        _until(lambda: "no_checkpoints" in _told(settings))
        _until(lambda: read_status(settings.run_dir, time.time()).state == "waiting")
        assert "no_checkpoints" in [problem.kind for problem in read_status(settings.run_dir, time.time()).problems]
        settings.checkpoint.dir.rmdir()
        away.rename(settings.checkpoint.dir)
        _until(lambda: _told(settings).count("start") == 2)
        process.terminate()
        process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    starts = [event.step for event in _events(settings) if event.kind == "start"]
    assert starts == [0, steps[-1]]
    assert _told(settings).count("no_checkpoints") == 1
    again = [record["step"] for record in read_metrics(settings.run_dir / METRICS)]
    assert again[: len(steps)] == steps == list(range(1, len(steps) + 1))


def test_a_run_that_is_moved_while_it_waits_is_resumed_there(tmp_path: Path, configure: Configure) -> None:
    settings = configure("waits", supervisor={"backoff_seconds": 600})
    process = _supervisor(settings, [Fault("crash", step=6, rank=1)])
    try:
        _until(lambda: "restart" in _told(settings))
        settings.run.dir.parent.rename(tmp_path / "moved")
        output, _ = process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    moved = tmp_path / "moved" / "runs" / "test"
    assert process.returncode == exit_report.DONE, output
    assert f"{settings.run_dir} was moved to {moved}: resuming there" in output
    told = [event.kind for event in read_journal(moved) if event.kind not in ("save", "best")]
    assert told == ["launch", "start", "crash", "restart", "restart", "launch", "start", "done"]
    assert not settings.run_dir.exists()
    steps = [record["step"] for record in read_metrics(moved / METRICS)]
    assert steps == list(range(1, STEPS + 1))


def test_what_can_do_nothing_by_itself_is_ended_by_the_next_supervisor(configure: Configure) -> None:
    """A rank is frozen, the others wait for it, and the supervisor is killed."""
    settings = configure("frozen", schedule=ENDLESS, supervisor={"hang_seconds": 600, "stop_seconds": 3})
    process = _supervisor(settings, [Fault("freeze", step=7, rank=1)])
    try:
        _until(lambda: (beat := read_beat(settings.run_dir, 1)) and _is_stopped(beat.pid))
    finally:
        process.kill()
        process.wait()
    after = _supervisor(settings)
    try:
        _until(lambda: _told(settings).count("start") == 2)
        assert "orphans" in _told(settings)
        (settings.run_dir / STOP_FILE).touch()  # a signal would leave them no more than the three seconds
        assert after.wait(60) == exit_report.STOPPED
        assert _left(settings) == []
    finally:
        end_session(after.pid)


def test_ranks_that_do_not_end_after_a_stop_are_killed_and_that_is_reported(configure: Configure) -> None:
    settings = configure("stuck", schedule=ENDLESS, supervisor={"hang_seconds": 600, "stop_seconds": 3})
    process = _supervisor(settings, [Fault("hang", step=7, rank=1)])
    try:
        _until(lambda: (beat := read_beat(settings.run_dir, 1)) and beat.step == 7)
        process.terminate()
        assert process.wait(60) == exit_report.CRASHED
        (event,) = [event for event in _events(settings) if event.kind == "crash"]
        assert event.text == (
            "the ranks have not ended 3s after the stop (supervisor.stop_seconds): they are killed;"
            " the newest checkpoint is of step 4"
        )
        assert _left(settings) == []
    finally:
        end_session(process.pid)


def _is_stopped(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() == psutil.STATUS_STOPPED
