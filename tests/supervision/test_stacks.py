"""The stacks of ranks that hang."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import psutil
import pytest
from launched import end_session, start

from ds_gpt2.supervision.stacks import write_stacks

STOPPED = """
import os, signal, sys, threading
from pathlib import Path
from ds_gpt2.run_dir.heartbeat import Heartbeat, enable_stack_dumps

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

running = threading.Semaphore(0)

def run_on():
    running.release()
    while True: pass

Heartbeat(Path(sys.argv[1]), 0).begin_step(1, 1)
enable_stack_dumps(Path(sys.argv[1]), 0)
for _ in range(3):
    threading.Thread(target=run_on, daemon=True).start()
    running.acquire()
stop()
run_on()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="glibc before 2.30 cannot signal one thread")
def test_the_stack_of_a_stopped_rank_shows_where_it_was_stopped(tmp_path: Path) -> None:
    """With a signal to the whole process, one of three stacks was of code that ran after the stop."""
    for turn in range(12):
        run_dir, directory = tmp_path / f"run{turn}", tmp_path / f"stacks{turn}"
        process = start([sys.executable, "-c", STOPPED, str(run_dir)])
        try:
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            write_stacks(run_dir, range(1), process.pid, directory)
            stacks = (directory / "rank_00000.txt").read_text(encoding="utf-8")
        finally:
            end_session(process.pid)
        assert "in stop\n" in stacks and stacks.count("in run_on\n") == 3, stacks
