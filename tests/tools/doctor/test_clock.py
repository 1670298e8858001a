"""Checks of the system clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ds_gpt2.tools.doctor import clock


def test_a_clock_behind_the_newest_file(tmp_path: Path) -> None:
    now = time.time()
    for name, age in (("old", 86_400), ("new", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    files = [tmp_path / "old", tmp_path / "new", tmp_path / "missing"]
    assert clock.not_behind(files, now).status == "ok"
    behind = clock.not_behind(files, now - 7200)
    assert behind.status == "warn"
    assert f"{tmp_path / 'new'} was modified 1h 59m later" in behind.found
    assert clock.synchronised().status in ("ok", "warn", "unknown")  # the last in most containers


@pytest.mark.parametrize(
    ("timedatectl", "leap_status", "status"),
    [
        ("yes", None, "ok"),
        ("no", None, "warn"),
        (None, None, "unknown"),
        (None, "Normal", "ok"),
        (None, "Insert second", "ok"),
        (None, "Not synchronised", "warn"),
        ("no", "Normal", "ok"),  # chronyd without rtcsync does not set the flag that systemd reads
        ("yes", "Not synchronised", "ok"),  # another NTP client
        ("", "", "unknown"),
    ],
)
def test_synchronization_as_reported_by_systemd_and_chronyd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timedatectl: str | None, leap_status: str | None, status: str
) -> None:
    tracking = f"A29FC87B,time.example.org,3,1700000000.0,0.1,0.1,0.1,1.0,0.0,0.1,0.01,0.001,64.2,{leap_status}"
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, answer in (("timedatectl", timedatectl), ("chronyc", tracking if leap_status else leap_status)):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n" if answer is None else f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
    finding = clock.synchronised()
    assert (finding.name, finding.status, bool(finding.fix)) == ("clock", status, status != "ok")


def test_synchronization_is_unknown_without_systemd_and_chronyd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clock.synchronised().status == "unknown"
