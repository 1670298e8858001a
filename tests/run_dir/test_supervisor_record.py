"""The record of a supervisor: whether it runs, on this machine and on another one."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ds_gpt2.common.process_identity import start_of
from ds_gpt2.run_dir.heartbeat import Heartbeat, read_beat
from ds_gpt2.run_dir.supervisor_record import RECORD, SupervisorRecord, read_supervisor_record, renew

NOW = 1e9


@pytest.fixture
def here() -> SupervisorRecord:
    start = start_of(os.getpid()) or ""
    return SupervisorRecord(os.getpid(), 1.0, socket.gethostname(), "running", 1, start=start, renewed=NOW)


def test_on_another_machine_the_lease_decides(here: SupervisorRecord) -> None:
    elsewhere = replace(here, host="elsewhere")
    assert elsewhere.is_alive(NOW + 59) and not elsewhere.is_alive(NOW + 61)
    assert not elsewhere.has_expired(NOW + 59) and elsewhere.has_expired(NOW + 61)
    assert not replace(elsewhere, state="ended").is_alive(NOW)
    assert not replace(elsewhere, state="ended").has_expired(NOW + 61)


def test_without_a_lease_a_supervisor_on_another_machine_counts_as_running(here: SupervisorRecord) -> None:
    earlier = replace(here, host="elsewhere", renewed=None)
    assert earlier.is_alive(NOW + 1e6) and not earlier.has_expired(NOW + 1e6)


def test_on_this_machine_the_process_decides(here: SupervisorRecord) -> None:
    assert here.is_alive(NOW + 1e6)
    assert not replace(here, start="of another process").is_alive(NOW)


def test_the_lease_is_the_time_of_the_file(here: SupervisorRecord, tmp_path: Path) -> None:
    here.write(tmp_path)
    os.utime(tmp_path / RECORD, (NOW - 500, NOW - 500))
    record = read_supervisor_record(tmp_path)
    assert record == replace(here, renewed=NOW - 500)
    content = (tmp_path / RECORD).read_bytes()
    renew(tmp_path)
    record = read_supervisor_record(tmp_path)
    assert record is not None and record.renewed is not None and record.renewed > NOW
    assert (tmp_path / RECORD).read_bytes() == content


def test_a_record_of_an_earlier_version_has_no_lease(here: SupervisorRecord, tmp_path: Path) -> None:
    here.write(tmp_path)
    values = json.loads((tmp_path / RECORD).read_text())
    del values["renewed"]
    (tmp_path / RECORD).write_text(json.dumps(values))
    assert read_supervisor_record(tmp_path) == replace(here, renewed=None)


@pytest.mark.parametrize("name", ["node1", "a" * 64, "größer 1", ""])
def test_heartbeats_name_their_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    Heartbeat(tmp_path, 0).begin_step(10**9, 10**9)
    assert (tmp_path / "heartbeat" / "rank_00000").stat().st_size == 160
    beat = read_beat(tmp_path, 0)
    assert beat is not None and (beat.pid, beat.start) == (os.getpid(), start_of(os.getpid()))
    assert not beat.is_of_other_host
    monkeypatch.setattr(socket, "gethostname", lambda: "a" * 63 + "b")
    assert beat.is_of_other_host == (name != "")


def test_heartbeats_of_earlier_versions_name_no_host(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0)
    start = start_of(psutil.Process().pid)
    (tmp_path / "heartbeat" / "rank_00000").write_text(f"9 1.5 {os.getpid()} 10 10 training {start}")
    beat = read_beat(tmp_path, 0)
    assert beat is not None and (beat.start, beat.host, beat.is_of_other_host) == (start, "", False)
