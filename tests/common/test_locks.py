"""Lock files are held by one process, and name it."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.locks import holder_of, last_host, lock


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
