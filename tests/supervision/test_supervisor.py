"""Supervised runs of real ranks, with faults and signals."""

from __future__ import annotations

import pickle
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
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.run_dir.stop_request import STOP_FILE
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.supervision.supervisor import supervise
from ds_gpt2.tools.drill import fault_injection
from ds_gpt2.tools.drill.compare import curve_differences
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.status.status import read_status

pytestmark = pytest.mark.ranks

STEPS = 24
SAVES = (
    "checkpoint.every=4",
    "checkpoint.async=false",
)  # synchronous, so that what is saved at a fault does not depend on time
# On a busy machine a step of a healthy run may take seconds: only a run with a stopped rank has a short limit.
QUICK = {"backoff_seconds": 0, "restarts": 3, "hang_seconds": 600}
ENDLESS = {"steps": 1_000_000, "warmup_steps": 3}

Configure = Callable[..., Settings]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Configure:
    def write(name: str, **sections: object) -> Settings:
        supervisor = {**QUICK, **sections.pop("supervisor", {})}  # type: ignore[dict-item]  # a section of the settings
        usual: dict[str, object] = {
            "batch": {"tokens_per_step": 128, "micro_batch": 2, "sequence_length": 16},
            "schedule": {"steps": STEPS, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4},
            "samples": {"every": 0},
            "validation": {"every": 12, "tokens": 64},
        }
        config = write_config(tmp_path_factory.mktemp(name), **{**usual, **sections, "supervisor": supervisor})
        return load_settings(config, dict(setting.split("=") for setting in SAVES))

    return write


@pytest.fixture(scope="module")
def undisturbed(configure: Configure) -> Settings:
    """Train without faults; return the settings of the run."""
    settings = configure("undisturbed")
    assert supervise(_run(settings), settings) == exit_codes.DONE
    return settings


def _run(settings: Settings, *faults: Fault, ranks: int = 2, resume: str | None = None) -> SupervisedRun:
    config = settings.run.dir.parent / "run.yaml"
    arguments = ("--config", str(config), *SAVES)
    return SupervisedRun(
        arguments,
        RankLayout("cpu", ranks),
        resume,
        script=fault_injection.SCRIPT,
        environment=fault_injection.request(faults),
    )


def _kinds(settings: Settings, *without: str) -> list[str]:
    """Return the kinds of the events in the journal."""
    return [event.kind for event in _events(settings) if event.kind not in without]


def _events(settings: Settings) -> list[Event]:
    return list(read_journal(settings.run_dir))


def _processes(settings: Settings) -> list[str]:
    """Return the command lines of the run's processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(settings.run.dir.parent) in command and process.status() != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def _until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.1)


def test_a_run_with_faults_has_the_same_results_as_a_run_without(
    tmp_path: Path, configure: Configure, undisturbed: Settings
) -> None:
    disturbed = configure("disturbed", supervisor={"hang_seconds": 6, "hang_factor": 5})
    assert _kinds(undisturbed, "save", "best") == ["launch", "start", "done"]
    faults = [
        Fault("kill", step=6, rank=1, once=str(tmp_path / "killed")),
        # The retries last longer than the interval of the watchdog, which then knows how long a step takes.
        *(Fault("read_error", batch=10, rank=1, once=str(tmp_path / f"unreadable_{read}")) for read in range(2)),
        Fault("freeze", step=11, rank=1, once=str(tmp_path / "frozen")),
        Fault("crash", step=19, rank=0, micro_batch=1, once=str(tmp_path / "crashed")),
    ]
    assert supervise(_run(disturbed, *faults), disturbed) == exit_codes.DONE
    assert curve_differences(undisturbed.run_dir, disturbed.run_dir) == []
    ends = [generation.manifest for generation in (scan(each.checkpoint_dir)[0] for each in (undisturbed, disturbed))]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].state["ledger"] == ends[1].state["ledger"] != ""
    again = ["restart", "launch", "start"]
    expected = ["launch", "start", "crash", *again, "data_error", "data_error", "hang", *again, "crash", *again, "done"]
    assert _kinds(disturbed, "save", "best") == expected
    unreadable, _ = [event.text for event in _events(disturbed) if event.kind == "data_error"]
    assert "rank 1: shard" in unreadable and "cannot be read: Input/output error; retrying in 0.5 s" in unreadable
    killed, hung, crashed = [event for event in _events(disturbed) if event.kind in ("crash", "hang")]
    assert "rank 1 was killed by SIGKILL" in killed.text
    assert (hung.step, "rank 1" in hung.text, "is stopped" in hung.text) == (11, True, True)
    stacks = Path(hung.facts["stacks"])
    assert "in _inject" in (stacks / "rank_00001.txt").read_text(encoding="utf-8")
    assert "State:" in (stacks / "rank_00000.txt").read_text(encoding="utf-8")
    assert "rank 0: RuntimeError: a fault injected by the drill" in crashed.text and crashed.step == 19
    record = read_supervisor_record(disturbed.run_dir)
    assert record is not None and (record.state, record.code, record.is_alive(time.time())) == (
        "ended",
        exit_codes.DONE,
        False,
    )
    assert _processes(disturbed) == []


def test_a_failing_evaluation_costs_neither_the_run_nor_the_save(configure: Configure, undisturbed: Settings) -> None:
    """Validation ends a rank at step 12 whenever it is tried, and raises an exception at step 24."""
    settings = configure("failing")
    faults = [Fault("kill", step=12, rank=1, evaluating=True), Fault("crash", step=24, evaluating=True)]
    assert supervise(_run(settings, *faults), settings) == exit_codes.DONE
    again = ["crash", "restart", "launch", "start"]
    failed = ["evaluation_failed"]
    assert _kinds(settings, "save") == ["launch", "start", *again, *again, *failed, *failed, "done"]
    assert [event.step for event in _events(settings) if event.kind == "start"] == [0, 12, 12]
    assert [event.step for event in _events(settings) if event.kind == "save"] == list(range(4, 25, 4))
    texts = [event.text for event in _events(settings) if event.kind == "evaluation_failed"]
    assert texts == [
        "no validation loss: its last attempts ended the process",
        "no validation loss: rank 0: a fault injected by the drill",
    ]
    records = [list(read_metrics(each.run_dir / METRICS)) for each in (undisturbed, settings)]
    losses = [[record["train/loss"] for record in each] for each in records]
    assert losses[0] == losses[1]
    assert [record["step"] for record in records[0] if "val/loss" in record] == [12, 24]
    assert not [record for record in records[1] if "val/loss" in record]
    assert all(found.manifest is not None and found.manifest.is_evaluated for found in scan(settings.checkpoint_dir))


@pytest.mark.extended
def test_a_failing_step_is_skipped_and_repeated_bad_gradients_are_rolled_back(configure: Configure) -> None:
    """After the same crash an older checkpoint is tried, then the batch is skipped; skipped updates are rolled back."""
    settings = configure("bad", supervisor={"skip_data": True}, guards={"skipped_run_steps": 2})
    bad = [Fault("crash", batch=9), *(Fault("nan", batch=batch, micro_batch=1) for batch in (16, 17))]
    assert supervise(_run(settings, *bad, ranks=1), settings) == exit_codes.DONE
    launches = [event.text for event in _events(settings) if event.kind == "launch"]
    assert [text.split(", ", 1)[1] for text in launches] == [
        "from the beginning",
        "resuming from the newest checkpoint, if there is one",
        "resuming from the newest checkpoint before step 8",
        "resuming from the newest checkpoint, if there is one, excluding batches 9",
        "resuming from the newest checkpoint before step 15, excluding batches 9,16-17",
    ]
    end = open_generation(settings.checkpoint_dir / str(newest_tag(settings.checkpoint_dir))).manifest
    assert end is not None
    assert (end.step, end.state["batch"], end.state["left_out"]) == (STEPS, STEPS + 3, [9, 16, 17])
    assert end.state["skipped_steps"] == 0  # the rollback has undone them
    assert _processes(settings) == []


def test_a_run_without_progress_is_given_up(configure: Configure) -> None:
    settings = configure("no_progress", supervisor={"restarts": 1})
    assert supervise(_run(settings, Fault("crash", step=1), ranks=1), settings) == exit_codes.CRASHED
    assert _kinds(settings) == ["launch", "start", "crash", "restart", "launch", "start", "crash", "gave_up"]
    assert [event.facts["restart"] for event in _events(settings) if event.kind == "launch"] == [False, True]
    history = read_status(settings.run_dir, time.time()).history
    assert (history.starts, history.restarts, history.resumes) == (2, 1, 0)


def test_a_configuration_error_is_not_retried(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    settings = configure("mistake")
    assert supervise(_run(settings, ranks=1, resume="epoch_00009"), settings) == exit_codes.MISTAKE
    assert _kinds(settings) == ["launch", "mistake"]
    assert read_status(settings.run_dir, time.time()).state == "mistake"  # although no rank has begun to train
    assert "epoch_00009" in capfd.readouterr().err


@pytest.mark.extended
def test_an_error_in_a_configuration_that_has_worked_before_is_retried(
    configure: Configure, dataset_dir: Path, tmp_path: Path
) -> None:
    """The data is moved away during the run, and back while the run restarts."""
    data, away = Path(shutil.copytree(dataset_dir, tmp_path / "data")), tmp_path / "elsewhere"
    patient = {"restarts": 30, "backoff_seconds": 1}
    settings = configure("away", data={"dir": str(data)}, supervisor=patient, validation={"every": 0})
    process = _supervisor(settings, [Fault("crash", step=23, once=str(tmp_path / "crashed"))], ranks=1)
    try:
        _until(lambda: "save" in _kinds(settings))
        data.rename(away)  # open files stay readable
        _until(lambda: "crash" in _kinds(settings))
        _until(lambda: _kinds(settings).count("crash") == 2)
        away.rename(data)
        assert process.wait(timeout=600) == exit_codes.DONE
    finally:
        end_session(process.pid)
    crashed = [event.text for event in _events(settings) if event.kind == "crash"]
    assert "a fault injected by the drill" in crashed[0]
    assert f"no data: {data} does not exist" in crashed[1]
    assert "mistake" not in _kinds(settings)


def _supervisor(settings: Settings, faults: Sequence[Fault] = (), ranks: int = 2) -> subprocess.Popen[str]:
    """Start a supervisor in another process."""
    program = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1])\n"
        "from ds_gpt2.supervision.supervisor import supervise\n"
        "sys.exit(supervise(*pickle.loads(bytes.fromhex(sys.argv[2]))))"
    )
    run = _run(settings, *faults, ranks=ranks, resume="auto")
    return start([sys.executable, "-c", program, str(PROJECT), pickle.dumps((run, settings)).hex()])


def test_the_run_survives_a_kill_of_the_launcher_and_saves_after_a_kill_of_the_supervisor(configure: Configure) -> None:
    settings = configure("orphans", schedule=ENDLESS)
    process = _supervisor(settings)
    try:
        _until(lambda: "save" in _kinds(settings))
        record = read_supervisor_record(settings.run_dir)
        assert record is not None and record.is_alive(time.time()) and record.group is not None
        psutil.Process(record.group).kill()  # DeepSpeed's launcher: its ranks save and are restarted
        _until(lambda: _kinds(settings).count("launch") == 2)
        assert "DeepSpeed's launcher was killed" in [event.text for event in _events(settings)]
        _until(lambda: _kinds(settings).count("start") == 2)
        process.kill()  # the supervisor: its ranks save and exit automatically
        process.wait()
        _until(lambda: _kinds(settings)[-1] == "stop" and not _processes(settings))
    finally:
        end_session(process.pid)


def test_a_stop_while_a_shard_cannot_be_read_saves_the_last_step(configure: Configure, undisturbed: Settings) -> None:
    settings = configure("unreadable")
    process = _supervisor(settings, [Fault("read_error", batch=10, rank=1)])
    try:
        _until(lambda: all((beat := read_beat(settings.run_dir, rank)) and beat.step == 10 for rank in range(2)))
        _until(lambda: "data_error" in _kinds(settings))
        process.terminate()
        output, _ = process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    assert process.returncode == exit_codes.STOPPED, output
    assert newest_tag(settings.checkpoint_dir) == "rolling_step_000009"
    assert supervise(_run(settings, resume="auto"), settings) == exit_codes.DONE
    assert curve_differences(undisturbed.run_dir, settings.run_dir) == []


def test_a_stop_file_stops_a_run_that_waits_or_starts(configure: Configure) -> None:
    settings = configure("stopped", supervisor={"backoff_seconds": 600})
    (settings.run_dir).mkdir(parents=True)
    (settings.run_dir / STOP_FILE).touch()  # of an earlier run: ignored
    process = _supervisor(settings, [Fault("crash", step=6)], ranks=1)
    try:
        _until(lambda: "restart" in _kinds(settings))
        (settings.run_dir / STOP_FILE).touch()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == exit_codes.STOPPED, output
        process = _supervisor(settings, ranks=1)
        _until(lambda: _kinds(settings).count("launch") == 2)
        (settings.run_dir / STOP_FILE).touch()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == exit_codes.STOPPED, output
    finally:
        end_session(process.pid)
    assert not (settings.run_dir / STOP_FILE).exists()
    assert newest_tag(settings.checkpoint_dir) == "rolling_step_000004"  # the second launch has made no step


@pytest.mark.extended
def test_a_run_with_nan_in_every_step_is_given_up(configure: Configure) -> None:
    settings = configure("nan", guards={"skipped_run": "off"}, supervisor={"restarts": 1})
    bad = [Fault("nan", batch=batch, micro_batch=1) for batch in range(1, STEPS + 1)]
    assert supervise(_run(settings, *bad, ranks=1), settings) == exit_codes.CRASHED
    assert "done" not in _kinds(settings) and _kinds(settings)[-1] == "gave_up"


@pytest.mark.extended
def test_a_restart_waits_for_missing_checkpoints(configure: Configure) -> None:
    """A new supervisor waits, too: after a reboot, their disk may be mounted late."""
    settings = configure("away", schedule=ENDLESS, supervisor={"longest_backoff_seconds": 1})
    process = _supervisor(settings, ranks=1)
    away = settings.checkpoint.dir.with_name("away")
    try:
        _until(lambda: _kinds(settings).count("save") == 2)
        process.terminate()
        process.communicate(timeout=600)
        steps = [record["step"] for record in read_metrics(settings.run_dir / METRICS)]
        settings.checkpoint.dir.rename(away)
        settings.checkpoint.dir.mkdir()
        process = _supervisor(settings, ranks=1)
        _until(lambda: "no_checkpoints" in _kinds(settings))
        _until(lambda: read_status(settings.run_dir, time.time()).state == "waiting")
        assert "no_checkpoints" in [problem.kind for problem in read_status(settings.run_dir, time.time()).problems]
        settings.checkpoint.dir.rmdir()
        away.rename(settings.checkpoint.dir)
        _until(lambda: _kinds(settings).count("start") == 2)
        process.terminate()
        process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    starts = [event.step for event in _events(settings) if event.kind == "start"]
    assert starts == [0, steps[-1]]
    assert _kinds(settings).count("no_checkpoints") == 1
    again = [record["step"] for record in read_metrics(settings.run_dir / METRICS)]
    assert again[: len(steps)] == steps == list(range(1, len(steps) + 1))


@pytest.mark.extended
def test_a_run_that_is_moved_while_it_waits_resumes_in_the_new_directory(tmp_path: Path, configure: Configure) -> None:
    settings = configure("waits", supervisor={"backoff_seconds": 60})
    process = _supervisor(settings, [Fault("crash", step=6)], ranks=1)
    try:
        _until(lambda: "restart" in _kinds(settings))
        settings.run.dir.parent.rename(tmp_path / "moved")
        output, _ = process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    moved = tmp_path / "moved" / "runs" / "test"
    assert process.returncode == exit_codes.DONE, output
    assert f"{settings.run_dir} was moved to {moved}: resuming there" in output
    kinds = [event.kind for event in read_journal(moved) if event.kind not in ("save", "best")]
    assert kinds == ["launch", "start", "crash", "restart", "restart", "launch", "start", "done"]
    assert not settings.run_dir.exists()
    steps = [record["step"] for record in read_metrics(moved / METRICS)]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.extended
def test_the_next_supervisor_ends_ranks_that_cannot_exit(configure: Configure) -> None:
    """One rank is stopped (SIGSTOP), the other waits for it, and the supervisor is killed."""
    settings = configure("frozen", schedule=ENDLESS, supervisor={"stop_seconds": 3})
    process = _supervisor(settings, [Fault("freeze", step=7, rank=1)])
    try:
        _until(lambda: (beat := read_beat(settings.run_dir, 1)) and _is_stopped(beat.pid))
    finally:
        process.kill()
        process.wait()
    after = _supervisor(settings)
    try:
        _until(lambda: _kinds(settings).count("start") == 2)
        assert "orphans" in _kinds(settings)
        (settings.run_dir / STOP_FILE).touch()  # after a signal the ranks would have stop_seconds only
        assert after.wait(60) == exit_codes.STOPPED
        assert _processes(settings) == []
    finally:
        end_session(after.pid)


def test_ranks_that_do_not_stop_in_time_are_killed_and_reported(configure: Configure) -> None:
    settings = configure("stuck", schedule=ENDLESS, supervisor={"stop_seconds": 3})
    process = _supervisor(settings, [Fault("hang", step=7)], ranks=1)
    try:
        _until(lambda: (beat := read_beat(settings.run_dir, 0)) and beat.step == 7)
        process.terminate()
        assert process.wait(60) == exit_codes.CRASHED
        (event,) = [event for event in _events(settings) if event.kind == "crash"]
        assert event.text == (
            "killing the ranks: they have not exited 3s after the stop request (supervisor.stop_seconds);"
            " the newest checkpoint is of step 4"
        )
        assert _processes(settings) == []
    finally:
        end_session(process.pid)


def _is_stopped(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() == psutil.STATUS_STOPPED
