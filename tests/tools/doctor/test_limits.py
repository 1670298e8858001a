"""Checks of process limits, Slurm, terminal, logout and reboots."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_helpers import UNPRIVILEGED_USER
from launched import PROJECT

from ds_gpt2.tools.doctor import limits


def under_limits(code: str, *limit: str) -> list[dict[str, str]]:
    """Run ``code`` in a process of an unprivileged user with ``limit``, such as ``RLIMIT_NOFILE=100``.

    Return the findings as dictionaries.
    """
    lowered = "".join(
        f"resource.setrlimit(resource.{name}, ({value}, {value}))\n"
        for name, value in (word.split("=") for word in limit)
    )
    program = (
        "import json, os, resource\nfrom dataclasses import asdict\nfrom ds_gpt2.tools.doctor import limits\n"
        f"{lowered}if os.geteuid() == 0:\n    os.setuid({UNPRIVILEGED_USER})\n"
        f"rows = {code}\nprint(json.dumps([asdict(row) for row in (rows if isinstance(rows, list) else [rows])]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("code", "limit", "expected"),
    [
        ("limits.open_files(4, 100)", "RLIMIT_NOFILE=200", {"open files": "fail"}),
        ("limits.open_files(4, 100)", "RLIMIT_NOFILE=300", {"open files": "ok"}),
        ("limits.open_files(4, 1000)", "RLIMIT_NOFILE=1024", {"open files": "ok"}),  # readers close some of so many
        ("limits.cpu_time()", "RLIMIT_CPU=3600", {"CPU time": "warn"}),
        ("limits.cpu_time()", "RLIMIT_CPU=300", {"CPU time": "fail"}),
        ("limits.processes(4)", "RLIMIT_NPROC=400", {"processes": "fail"}),
        ("limits.sizes(10**9)", "RLIMIT_FSIZE=1500000000", {"file size": "fail"}),
        ("limits.sizes(10**6)", "RLIMIT_FSIZE=1500000000", {"file size": "ok"}),
        ("limits.sizes(10**6)", "RLIMIT_AS=30000000000", {"address space": "warn"}),
    ],
)
def test_process_limits(code: str, limit: str, expected: dict[str, str]) -> None:
    rows = under_limits(code, limit)
    assert {row["name"]: row["status"] for row in rows} == expected
    assert all(bool(row["fix"]) == (row["status"] != "ok") for row in rows)


def test_end_of_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    job = {"SLURM_JOB_ID": "7"}
    assert limits.time_limit({}, now).status == "ok"
    row = limits.time_limit({**job, "SLURM_JOB_END_TIME": "1800086400"}, now)
    assert (row.status, "in 1d" in row.found) == ("warn", True)
    assert limits.time_limit({**job, "SLURM_JOB_END_TIME": "1800000300"}, now).status == "fail"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert limits.time_limit(job, now).status == "unknown"
    (tmp_path / "squeue").write_text("#!/bin/sh\n[ \"$*\" = '-h -j 7 -o %L' ] && echo 1-02:03:04\n")
    (tmp_path / "squeue").chmod(0o755)
    assert "in 1d 2h" in limits.time_limit(job, now).found
    assert [limits.parse_time_left(text) for text in ("12:34", "1:00:00", "UNLIMITED")] == [754.0, 3600.0, None]


def test_terminals_that_would_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # the tests may run under nohup
    over_ssh = {"SSH_CONNECTION": "10.0.0.2 50000 10.0.0.1 22"}
    plain = limits.terminal(over_ssh, ["tmux", "systemd-run"])
    assert (plain.status, "`tmux new -s gpt2 ./launch.sh train ...`" in plain.fix) == ("warn", True)
    assert "nohup" in limits.terminal(over_ssh, []).fix
    assert limits.terminal({**over_ssh, "TMUX": "/tmp/tmux-0/default,1,0"}, ["tmux"]).status == "ok"
    assert limits.terminal({}, []).status == "ok"
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    assert "nohup" in limits.terminal(over_ssh, []).found


def test_systemd_kills_processes_at_logout(tmp_path: Path) -> None:
    session = {"XDG_SESSION_ID": "3"}
    (tmp_path / "etc/systemd/logind.conf.d").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("[Login]\n#KillUserProcesses=yes\n")
    assert limits.logout(session, "me", tmp_path).status == "ok"
    (tmp_path / "etc/systemd/logind.conf.d/50-site.conf").write_text("[Login]\nKillUserProcesses = yes\n")
    assert limits.logout(session, "me", tmp_path).status == "warn"
    assert limits.logout({}, "me", tmp_path).status == "ok"
    (tmp_path / "var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/linger/me").touch()
    assert limits.logout(session, "me", tmp_path).status == "ok"


def test_pending_and_automatic_reboots(tmp_path: Path) -> None:
    assert [row.status for row in limits.reboots(True, tmp_path)] == ["ok"]
    apt = tmp_path / "etc/apt/apt.conf.d"
    apt.mkdir(parents=True)
    (apt / "20auto-upgrades").write_text('APT::Periodic::Unattended-Upgrade "1";\n')
    (apt / "50unattended-upgrades").write_text('//Unattended-Upgrade::Automatic-Reboot "true";\n')
    assert [row.status for row in limits.reboots(False, tmp_path)] == ["ok"]
    assert "GPU driver" in limits.reboots(True, tmp_path)[0].found
    (apt / "60mine").write_text('Unattended-Upgrade::Automatic-Reboot "true";\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/reboot-required").touch()
    assert [row.name for row in limits.reboots(False, tmp_path)] == ["reboot", "updates"]
