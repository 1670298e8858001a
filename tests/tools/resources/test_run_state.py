"""State of a run from its processes, heartbeats and journal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from run_files import DAY, HOUR, NOW, RunFiles

from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.common.formatting import clock
from ds_gpt2.common.locks import lock
from ds_gpt2.run_dir.heartbeat import Heartbeat, Phase, read_beat
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.tools.status.screen import screen
from ds_gpt2.tools.status.status import read_status


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
def test_state_follows_the_phase_of_the_ranks(healthy_run: RunFiles, phase: Phase, state: str) -> None:
    healthy_run.beat(phase)
    status = healthy_run.status()
    assert (status.state, status.healthy, status.problems) == (state, True, [])


@pytest.mark.parametrize(
    ("step_seconds", "phase", "timeout"),
    [
        (10.0, "training", 300.0),  # supervisor.hang_seconds
        (60.0, "training", 1200.0),  # 20 times a step: supervisor.hang_factor
        (10.0, "evaluating", 2700.0),  # supervisor.patience_minutes
    ],
)
def test_hung_after_the_timeout_of_the_watchdog(
    healthy_run: RunFiles, step_seconds: float, phase: Phase, timeout: float
) -> None:
    healthy_run.train(1000, step_seconds)
    healthy_run.beat(phase)
    waited = time.time() - NOW
    assert healthy_run.status(waited + timeout - 5).healthy
    status = healthy_run.status(waited + timeout + 5)
    assert (status.state, status.healthy) == ("hung?", False)
    assert status.state_text is not None
    assert f"in step 1,000 ({phase})" in status.state_text
    assert [problem.kind for problem in status.problems] == ["hang"]


def test_first_step_of_a_start_has_a_longer_timeout(healthy_run: RunFiles) -> None:
    healthy_run.journal("start", 20, 999)
    waited = time.time() - NOW
    assert healthy_run.status(waited + 2600).state == "running"
    assert healthy_run.status(waited + 2800).state == "hung?"


def test_process_with_a_reused_pid_is_not_a_rank(healthy_run: RunFiles) -> None:
    """This process exists, but started after the heartbeat was written."""
    long_ago = psutil.Process().create_time() - 60
    (healthy_run.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {long_ago} {os.getpid()} 1000 1000 training")
    assert healthy_run.status().state == "dead"


def test_dead_after_the_rank_is_killed(files: RunFiles, other_process: subprocess.Popen[bytes]) -> None:
    files.train(1000)
    files.journal("start", 10_000, 0)
    files.save(950)
    (files.run_dir / "heartbeat").mkdir()
    (files.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {time.time()} {other_process.pid} 1000 1000 training")
    assert files.status().state == "running"
    os.kill(other_process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which retains its PID
    status = files.status()
    assert (status.state, status.healthy) == ("dead", False)
    assert [problem.text for problem in status.problems] == [
        f"the run has no process; resume with ./launch.sh resume {files.run_dir}"
    ]
    files.journal("crash", 0, 1000, "rank 0: RuntimeError: out of memory")
    assert files.problems() == [f"rank 0: RuntimeError: out of memory; resume with ./launch.sh resume {files.run_dir}"]


@pytest.mark.parametrize("kind", ["save_failed", "not_finite"])
def test_a_failed_end_explains_the_state(files: RunFiles, kind: str) -> None:
    files.train(1000)
    files.journal("start", 10_000, 0)
    files.journal(kind, 600, 900, "this one did not end the run")
    assert files.status().state_text is None
    files.journal(kind, 0, 1000, "the last state could not be saved", {"ended": True})
    status = files.status()
    assert (status.state, status.state_text) == ("dead", "the last state could not be saved")


@pytest.mark.parametrize(
    ("kind", "state", "healthy"),
    [
        ("done", "finished", True),
        ("stop", "stopped", True),
        ("mistake", "mistake", False),
        ("gave_up", "gave up", False),
    ],
)
def test_final_event_determines_the_state(files: RunFiles, kind: str, state: str, healthy: bool) -> None:
    files.train(1000)
    files.journal("start", 10_000, 0)
    files.journal(kind, 9 * DAY, 1000)
    files.journal("save_failed", 9 * DAY, 900)  # no longer relevant
    status = files.status()
    assert (status.state, status.healthy) == (state, healthy)
    assert status.finish_time is None
    files.journal("start", 50, 1000)
    assert files.status().state == "dead"  # resumed, without any later event


def test_dead_if_only_the_settings_exist(files: RunFiles) -> None:
    status = files.status()
    assert (status.state, status.progress.step, status.checkpoint) == ("dead", 0, None)
    assert "checkpoint  none yet" in screen(status)


def test_waiting_supervisor_is_healthy_until_the_restart_is_overdue(files: RunFiles) -> None:
    files.train(1000)
    for kind, ago in (("launch", 100), ("start", 90), ("crash", 9)):
        files.journal(kind, ago, 0)
    files.supervise("waiting", next_start=NOW + 300)
    status = files.status()
    assert (status.state, status.healthy) == ("waiting", True)
    assert "next start  in 5m" in screen(status)
    assert files.status(later=350).healthy
    assert files.problems(later=420) == ["the supervisor's restart is overdue by 2m"]


def test_supervisor_without_ranks_is_starting_until_the_timeout(files: RunFiles) -> None:
    files.supervise("running")
    files.journal("launch", 0)
    assert files.status(later=2600).state == "starting"
    assert files.problems(later=2800) == ["no rank has started for 46m 40s"]


def test_supervisor_has_time_to_detect_dead_ranks(files: RunFiles, other_process: subprocess.Popen[bytes]) -> None:
    """The time is stop_seconds and one minute."""
    files.supervise("running")
    files.journal("launch", 5000)
    files.journal("start", 4900, 0)
    (files.run_dir / "heartbeat").mkdir()
    (files.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {NOW} {other_process.pid} 1000 1000 training")
    other_process.kill()
    other_process.wait()
    assert files.status(later=170).state == "waiting"
    assert files.status(later=190).state == "hung?"
    files.journal("done", 0)
    assert files.status(later=190).state == "finished"


@pytest.mark.parametrize(
    ("code", "before", "state"),
    [
        (0, "start", "finished"),
        (3, "restart", "stopped"),  # stop requested while it waited
        (2, "launch", "mistake"),
        (1, "launch", "stopped"),  # stop requested before there was anything to save
        (1, "start", "dead"),  # stop requested, but the save failed
    ],
)
def test_exit_code_of_an_ended_supervisor_determines_the_state(
    files: RunFiles, code: int, before: str, state: str
) -> None:
    files.journal(before, 60, 0)
    files.supervise("ended", code=code)
    assert files.status().state == state


def test_record_of_an_earlier_supervisor_does_not_apply_to_a_later_start(files: RunFiles) -> None:
    files.supervise("ended", code=3)
    later = time.time() - NOW + 60  # the record is written now; NOW is the import time of the module
    files.journal("start", -later, 0)
    assert files.status(later + 60).state == "dead"


def test_dead_if_the_supervisor_was_killed(files: RunFiles, other_process: subprocess.Popen[bytes]) -> None:
    """The ranks of a killed supervisor save and exit as after a stop request."""
    files.train(1000)
    files.supervise("running", other_process.pid)
    for kind, ago in (("launch", 100), ("start", 90), ("stop", 0)):
        files.journal(kind, ago, 0)
    assert files.status().state == "stopped"  # the supervisor is about to exit, too
    other_process.kill()
    other_process.wait()
    status = files.status()
    assert (status.state, status.healthy) == ("dead", False)
    assert status.state_text == "the supervisor was killed; the ranks have saved and exited"
    files.journal("start", 0, 0)  # again, without a supervisor
    files.journal("stop", 0, 1000)
    assert files.status().state == "stopped"


def test_heartbeats_determine_the_state_on_another_host(
    healthy_run: RunFiles, other_process: subprocess.Popen[bytes]
) -> None:
    other_process.kill()
    other_process.wait()
    (healthy_run.run_dir / "heartbeat" / "rank_00000").write_text(f"9 {NOW} {other_process.pid} 1000 1000 training")
    assert healthy_run.status().state == "dead"
    os.utime(healthy_run.run_dir / "heartbeat" / "rank_00000", (NOW, NOW))
    (healthy_run.folder / "checkpoints" / "test" / LOCK).write_text(f"{other_process.pid} on elsewhere\n")
    assert healthy_run.status(later=200).state == "running"
    assert healthy_run.status(later=400).state == "dead"


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
def test_final_event_of_another_host_applies_immediately(
    on_other_host: RunFiles, kind: str, state: str, healthy: bool
) -> None:
    """The event applies although the last heartbeat is recent."""
    on_other_host.beat_on_other_host("finishing", 1000)
    assert on_other_host.status().state == "finishing"
    on_other_host.journal(kind, 0, 1000)
    status = on_other_host.status(later=1)
    assert (status.state, status.healthy) == (state, healthy)
    assert (status.beat_age_seconds, status.finish_time) == (None, None)


@pytest.mark.parametrize("clock", [-3 * HOUR, 3 * HOUR])
def test_final_event_of_another_host_applies_despite_a_wrong_clock(on_other_host: RunFiles, clock: float) -> None:
    on_other_host.beat_on_other_host("finishing", 1000, NOW + clock)
    on_other_host.journal("stop", -clock, 1000)
    assert on_other_host.status(later=1).state == "stopped"


def test_stopped_with_a_supervisor_on_another_host(on_other_host: RunFiles) -> None:
    on_other_host.supervise("running", host="elsewhere")
    for kind, ago in (("launch", 90), ("start", 80), ("stop", 1)):
        on_other_host.journal(kind, ago, 1000)
    assert on_other_host.status().state == "stopped"
    on_other_host.supervise("ended", host="elsewhere", code=3)
    assert on_other_host.status().state == "stopped"


def test_a_stopped_run_whose_supervisor_may_still_run_says_so(on_other_host: RunFiles) -> None:
    """As ``resume`` does, which refuses the run meanwhile."""
    on_other_host.supervise("running", host="elsewhere", renewed=NOW - 29)
    for kind, ago in (("launch", 90), ("start", 80), ("stop", 29)):
        on_other_host.journal(kind, ago, 1000)
    status = on_other_host.status()
    assert (status.state, status.healthy) == ("stopped", True)
    text = f"supervised by process {os.getpid()} on elsewhere, last seen 29s ago"
    assert status.state_text == text
    shown = " ".join(screen(status).split())
    assert f"state {text}" in shown
    assert on_other_host.status(later=40).state == "dead"


def test_manual_start_on_another_host_is_starting_before_it_trains(on_other_host: RunFiles) -> None:
    on_other_host.journal("stop", 60, 1000)
    on_other_host.beat_on_other_host("starting", 0)
    assert on_other_host.status().state == "starting"
    on_other_host.journal("start", 0, 1000)
    on_other_host.beat_on_other_host("training", 1001)
    assert on_other_host.status().state == "running"


def test_slow_clock_of_another_host_does_not_make_it_dead(on_other_host: RunFiles) -> None:
    """The modification time of the heartbeat file comes from the file server."""
    on_other_host.beat_on_other_host("training", 1000, NOW - 3 * HOUR)
    status = on_other_host.status()
    assert status.state == "running"
    assert status.beat_age_seconds is not None and status.beat_age_seconds < 600
    os.utime(on_other_host.run_dir / "heartbeat" / "rank_00000", (NOW - 3 * HOUR, NOW - 3 * HOUR))
    assert on_other_host.status().state == "dead"


def test_hung_names_the_rank(healthy_run: RunFiles) -> None:
    """The other ranks are in a phase with a longer timeout, or have a newer heartbeat."""
    healthy_run.beat("saving")
    Heartbeat(healthy_run.run_dir, 1).begin_step(1000, 1000)
    time.sleep(0.01)
    Heartbeat(healthy_run.run_dir, 2).begin_step(1000, 1000)
    beat = read_beat(healthy_run.run_dir, 1)
    assert beat is not None
    status = healthy_run.status(later=beat.time - NOW + 400.5)
    assert (status.state, status.state_text) == ("hung?", "rank 1: no heartbeat for 6m 40s, in step 1,000 (training)")


@pytest.mark.parametrize(("unevaluated", "state"), [(None, "finished"), ({"train/loss": 2.0}, "dead")])
def test_finished_if_the_final_checkpoint_is_evaluated_but_not_journaled(
    healthy_run: RunFiles, unevaluated: dict[str, float] | None, state: str
) -> None:
    healthy_run.save(2000, state={"unevaluated": unevaluated})
    (healthy_run.run_dir / "heartbeat" / "rank_00000").unlink()
    assert healthy_run.status().state == state


def test_a_copy_of_a_run_in_use_is_not_running(healthy_run: RunFiles) -> None:
    """The record of the supervisor and the heartbeats are copied, too."""
    run_dir = healthy_run.run_dir
    (run_dir / "supervisor").mkdir()
    with lock(run_dir / "supervisor" / "lock", "run test"):
        healthy_run.supervise("running")
        shutil.copytree(run_dir, run_dir.with_name("copy"))
        assert healthy_run.status().state == "running"
        assert read_status(run_dir.with_name("copy"), NOW).state == "dead"
        shutil.rmtree(run_dir.with_name("copy") / "heartbeat")
        assert read_status(run_dir.with_name("copy"), NOW).state == "dead"


def test_a_copy_does_not_take_over_ranks_that_the_supervisor_of_the_original_has_left(healthy_run: RunFiles) -> None:
    run_dir = healthy_run.run_dir
    healthy_run.supervise("running", start="of a dead process", group=os.getpid())
    healthy_run.beat()
    shutil.copytree(run_dir, run_dir.with_name("copy"))
    assert read_supervisor_record(run_dir) is not None
    assert read_supervisor_record(run_dir.with_name("copy")) is None


def _lose(run: RunFiles, ago: float) -> None:
    """Write what is left of a run whose machine was lost ``ago`` seconds before now."""
    run.supervise("running", host="elsewhere", renewed=NOW - ago)
    run.beat_on_other_host("training", 1000, NOW - ago, host="elsewhere")
    os.utime(run.run_dir / "heartbeat" / "rank_00000", (NOW - ago, NOW - ago))


def test_a_run_whose_machine_is_lost_is_dead_after_a_minute(on_other_host: RunFiles) -> None:
    _lose(on_other_host, 50)
    assert (on_other_host.status().state, on_other_host.status().healthy) == ("running", True)
    _lose(on_other_host, 70)
    status = on_other_host.status()
    assert (status.state, status.healthy) == ("dead", False)
    text = f"not seen since {clock(NOW - 70)}: the supervisor on elsewhere is gone, or that machine"
    assert status.state_text == text
    assert status.problems[0].text == f"{text}; resume with ./launch.sh resume {on_other_host.run_dir}"


def test_a_waiting_supervisor_on_a_lost_machine_is_dead(on_other_host: RunFiles) -> None:
    on_other_host.journal("crash", 20, 1000)
    on_other_host.supervise("waiting", host="elsewhere", renewed=NOW - 50, next_start=NOW + 10)
    assert on_other_host.status().state == "waiting"
    on_other_host.supervise("waiting", host="elsewhere", renewed=NOW - 70, next_start=NOW - 60)
    assert on_other_host.status().state == "dead"


def test_ranks_that_were_started_by_hand_after_the_loss_of_a_supervisor_are_running(on_other_host: RunFiles) -> None:
    on_other_host.supervise("running", host="elsewhere", renewed=NOW - HOUR)
    on_other_host.journal("start", 200, 950)
    on_other_host.beat_on_other_host("training", 1000, NOW - 100, host="elsewhere")
    os.utime(on_other_host.run_dir / "heartbeat" / "rank_00000", (NOW - 100, NOW - 100))
    assert on_other_host.status().state == "running"
    assert on_other_host.status(later=250).state_text is None


def test_a_run_of_which_the_other_host_has_ended_the_supervisor_is_not_lost(on_other_host: RunFiles) -> None:
    on_other_host.journal("stop", 100, 1000)
    on_other_host.supervise("ended", host="elsewhere", code=3, renewed=NOW - HOUR)
    assert on_other_host.status().state == "stopped"


def test_ranks_on_another_host_are_not_looked_for_here(healthy_run: RunFiles) -> None:
    """Rank 0 and the supervisor are on this host, rank 1 on another."""
    healthy_run.supervise("running", ranks=2, renewed=NOW)
    waited = time.time() - NOW
    healthy_run.beat()
    old = NOW + waited - 200
    healthy_run.beat_on_other_host("training", 1000, old, rank=1, host="elsewhere")
    os.utime(healthy_run.run_dir / "heartbeat" / "rank_00001", (old, old))
    assert healthy_run.status(waited).state == "running"
    status = healthy_run.status(waited + 150)
    assert status.state == "hung?"
    assert status.state_text is not None and status.state_text.startswith("rank 1: no heartbeat for 5m 50s")


def test_ranks_on_another_host_run_although_rank_0_is_gone(healthy_run: RunFiles) -> None:
    """The lock names this host, but their process ids are not of this host."""
    (healthy_run.run_dir / "heartbeat" / "rank_00000").unlink()
    healthy_run.beat_on_other_host("saving", 1000, NOW, host="elsewhere")
    assert healthy_run.status().state == "saving"
