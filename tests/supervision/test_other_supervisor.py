"""A run whose directories another machine uses, too, on a disk whose locks do not reach this one."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.locks import Lock
from ds_gpt2.common.process_identity import start_of
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.supervisor_record import RECORD, SUPERVISOR_DIR, SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision import reporter as reporter_module
from ds_gpt2.supervision import supervisor as supervisor_module
from ds_gpt2.supervision import waiting
from ds_gpt2.supervision.context import Context, TakenOverError
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.other_supervisor import check_unsupervised
from ds_gpt2.supervision.rank_watch import RankWatch
from ds_gpt2.supervision.stop_signals import StopSignals
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.supervision.supervisor import supervise
from ds_gpt2.supervision.waiting import wait_for_restart

RUN = SupervisedRun((), RankLayout("cpu", 2))
ELSEWHERE = SupervisorRecord(12, 1.0, "elsewhere", "running", 2, renewed=1.0)


@pytest.fixture
def settings(tmp_path: Path, write_config: Callable[..., Path]) -> Settings:
    loaded = load_settings(write_config(tmp_path))
    (loaded.run_dir / SUPERVISOR_DIR).mkdir(parents=True)
    return loaded


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Replace the work of the supervisor."""
    stand_in = mock.Mock(**{"return_value.run_to_end.return_value": 0, "return_value.next_command": []})
    monkeypatch.setattr(supervisor_module, "_Supervisor", stand_in)
    return stand_in


def test_a_run_that_another_machine_supervises_is_refused_until_its_lease_ends(
    settings: Settings, supervised: mock.Mock
) -> None:
    ELSEWHERE.write(settings.run_dir)
    text = (
        r"run test is supervised by process 12 on elsewhere, last seen \d+s ago: wait until it ends, or stop it \(it "
    )
    stop = rf"saves first\): `touch {settings.run_dir}/STOP`; a new run needs another run.name; if that machine is lost"
    with pytest.raises(UserError, match=rf"^{text}{stop}, wait \d.*$"):
        supervise(RUN, settings)
    assert not supervised.called
    then = time.time() - 61
    os.utime(settings.run_dir / RECORD, (then, then))
    assert supervise(RUN, settings) == 0


def test_a_run_that_this_machine_supervises_is_refused_until_the_supervisor_ends(settings: Settings) -> None:
    with subprocess.Popen(["sleep", "30"]) as other:
        start = start_of(other.pid) or ""
        SupervisorRecord(other.pid, 1.0, socket.gethostname(), "running", 2, start=start).write(settings.run_dir)
        with pytest.raises(
            UserError, match=rf"supervised by process {other.pid} on {socket.gethostname()}: wait until"
        ):
            check_unsupervised(settings)
        other.kill()
    check_unsupervised(settings)


@pytest.mark.parametrize("values", [{"state": "ended"}, {"renewed": None}])
def test_a_run_whose_supervisor_on_another_machine_has_ended_or_has_no_lease_starts(
    settings: Settings, supervised: mock.Mock, values: dict[str, Any]
) -> None:
    SupervisorRecord(**{**vars(ELSEWHERE), **values}).write(settings.run_dir)
    assert supervise(RUN, settings) == 0
    assert supervised.called


def test_the_lease_is_renewed_from_the_first_record_to_the_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter_module, "Renewal", lambda renew: mock.Mock(renew=renew))
    ELSEWHERE.write(settings.run_dir)
    reporter = Context(settings, StopSignals(), 2).reporter
    assert reporter._renewal is None
    reporter.record_waiting(30)
    renewal: Any = reporter._renewal
    os.utime(settings.run_dir / RECORD, (1, 1))
    renewal.renew()
    record = read_supervisor_record(settings.run_dir)
    assert record is not None and record.renewed is not None and record.renewed > time.time() - 60
    reporter.close()
    assert renewal.close.called


@pytest.fixture
def taken(settings: Settings) -> Iterator[Lock]:
    """The lock of a supervisor that another machine has taken."""
    path = settings.run_dir / SUPERVISOR_DIR / "lock"
    lock = Lock(path.open("a+b"), renew_seconds=0.01)
    path.write_text("12 on elsewhere\n")
    while lock.taken_by is None:
        time.sleep(0.01)
    yield lock
    lock.close()


def test_ranks_are_killed_and_not_saved_when_another_machine_has_taken_over(settings: Settings, taken: Lock) -> None:
    context = Context(settings, StopSignals(), 2, taken)
    killed = threading.Event()
    ranks = mock.Mock(count=2, kill=killed.set, is_launcher_running=True, are_stuck=False)
    type(ranks).have_exited = mock.PropertyMock(side_effect=killed.is_set)
    with pytest.raises(TakenOverError, match="process 12 on elsewhere has taken over the run"):
        RankWatch(context, ranks).wait()
    assert killed.is_set() and not ranks.request_stop.called


def test_a_waiting_supervisor_ends_when_another_machine_has_taken_over(settings: Settings, taken: Lock) -> None:
    context = Context(settings, StopSignals(), 2, taken)
    with pytest.raises(TakenOverError):
        wait_for_restart(context, mock.Mock(seconds=60, text="soon"))


def test_a_supervisor_that_was_replaced_does_not_write_into_the_run(
    settings: Settings, taken: Lock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ELSEWHERE.write(settings.run_dir)
    old = supervisor_module._Supervisor(RUN, settings, StopSignals(), None, taken)

    def wait(context: Context, resume: str | None) -> bool:
        context.poll()
        return True

    monkeypatch.setattr(waiting, "wait_for_checkpoints", wait)
    assert old.run_to_end() == exit_codes.CRASHED
    text = "supervisor: process 12 on elsewhere has taken over the run: the ranks of this supervisor were ended\n"
    assert capsys.readouterr().err == text
    record = read_supervisor_record(settings.run_dir)
    assert record is not None and record.host == "elsewhere"
    assert not (settings.run_dir / JOURNAL).exists()
