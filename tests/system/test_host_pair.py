"""What the tests and benchmarks of two hosts do to this machine before they make the hosts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import host_pair


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the commands by ones that do nothing, of which ``unshare`` fails; return them as they are called."""
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, int(command[0] == "unshare"), "", "not permitted\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("sys.platform", "linux")
    return called


@pytest.mark.parametrize("has_services", [True, False])
def test_packages_are_installed_only_where_no_services_run(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_services: bool
) -> None:
    monkeypatch.setattr(host_pair, "_SYSTEMD", tmp_path if has_services else tmp_path / "missing")
    monkeypatch.setattr(host_pair, "_missing", lambda: ["iproute2", "openssh-server"])
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/bin/{name}")
    reason = host_pair.problem.__wrapped__() or ""
    if has_services:
        assert reason == "two hosts need missing packages: `apt-get install iproute2 openssh-server`"
        assert commands == []
    else:
        assert commands[0][-2:] == ["iproute2", "openssh-server"] and "cannot be installed" in reason


def test_the_namespace_of_the_probe_is_deleted_also_after_a_failure(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pair, "_missing", list)
    reason = host_pair.problem.__wrapped__()
    assert reason is not None and reason.endswith("unshare --net --pid --fork --mount true: not permitted")
    (_, _, _, name), *_, last = commands
    assert last == ["ip", "netns", "delete", name]
