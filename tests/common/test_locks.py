"""Lock files are held by one process, and name it."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.common import locks
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.locks import Lock, holder_of, last_host, lock


def test_a_process_holds_a_lock_until_it_ends(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib, time; from ds_gpt2.common.locks import lock; held = lock(pathlib.Path(sys.argv[1]), 'it')"
    )
    command = [sys.executable, "-c", f"{hold}; print(flush=True); time.sleep(60)", str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    with pytest.raises(UserError, match=rf"run x is in use by process {holder.pid} on .*: wait until it ends"):
        lock(tmp_path / "lock", "run x")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with lock(tmp_path / "lock", "run x"), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock(tmp_path / "lock", "run x")
    lock(tmp_path / "lock", "run x").close()


def test_a_lock_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*: Is a directory"):
        lock(tmp_path / "lock", "run x")


def test_the_holder_of_a_lock_is_readable_while_it_is_held(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert (holder_of(file), last_host(file)) == (None, None)
    with lock(file, "run x"):
        assert holder_of(file) == f"{os.getpid()} on {socket.gethostname()}"
        assert last_host(file) == socket.gethostname()
    assert (holder_of(file), last_host(file)) == (None, socket.gethostname())


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"12 on", b"12"])
def test_a_damaged_lock_file_names_no_host(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert (holder_of(tmp_path / "lock"), last_host(tmp_path / "lock")) == (None, None)


def test_a_lock_that_another_process_checks_at_the_same_moment_is_acquired(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open("rb") as checking:
        fcntl.flock(checking, fcntl.LOCK_SH)
        threading.Timer(0.03, checking.close).start()
        lock(path, "run x").close()


@pytest.fixture
def of_other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file of another host, on a disk whose locks do not reach this one; its lease ends in a second."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.02)
    path = tmp_path / "lock"
    path.write_text("12 on elsewhere\n")
    return path


def test_a_lock_that_another_host_renews_is_refused(of_other_host: Path) -> None:
    threading.Timer(0.2, os.utime, [of_other_host]).start()
    with pytest.raises(UserError, match="run x is in use by process 12 on elsewhere: wait until it ends, or stop it"):
        lock(of_other_host, "run x")
    assert of_other_host.read_text() == "12 on elsewhere\n"


def test_a_lock_that_another_host_does_not_renew_is_taken_when_its_lease_ends(of_other_host: Path) -> None:
    before = time.monotonic()
    with lock(of_other_host, "run x"):
        assert time.monotonic() - before > 0.8
        assert last_host(of_other_host) == socket.gethostname()
    of_other_host.write_text("12 on elsewhere\n")
    os.utime(of_other_host, (time.time() - 2, time.time() - 2))
    before = time.monotonic()
    lock(of_other_host, "run x").close()
    assert time.monotonic() - before < 0.5


def test_a_lock_that_another_host_releases_is_taken_immediately(of_other_host: Path) -> None:
    lock(of_other_host, "run x").close()
    of_other_host.write_text("12 on elsewhere\n")
    os.utime(of_other_host, (0, 0))
    before = time.monotonic()
    lock(of_other_host, "run x").close()
    assert time.monotonic() - before < 0.5
    assert of_other_host.stat().st_mtime == 0


def test_a_lock_of_this_host_is_taken_immediately_after_a_crash(of_other_host: Path) -> None:
    of_other_host.write_text(f"12 on {socket.gethostname()}\n")
    before = time.monotonic()
    lock(of_other_host, "run x").close()
    assert time.monotonic() - before < 0.5


def test_the_holder_renews_its_lease_and_notices_that_another_host_has_taken_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path.open("a+b"), renew_seconds=0.01) as held:
        os.utime(path, (1, 1))
        _wait_for(lambda: path.stat().st_mtime > 1)
        assert held.taken_by is None
        path.write_text("12 on elsewhere\n")
        _wait_for(lambda: held.taken_by is not None)
        assert held.taken_by == "12 on elsewhere"
        os.utime(path, (1, 1))
        time.sleep(0.1)
        assert path.stat().st_mtime == 1
    assert path.stat().st_mtime == 1  # of the other holder, which has not released it


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
