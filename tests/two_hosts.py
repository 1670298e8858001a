"""Two hosts on this machine for a test, the settings of a small run on them, and commands that they run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from small_run import MODEL

from benchmarks.host_pair import Host, TwoHosts, problem

__all__ = ["Host", "HostCommand", "TwoHosts", "assert_nothing_is_left", "small_run", "two_hosts"]


def small_run(folder: Path, steps: int, every: int, **sections: object) -> dict[str, object]:
    """Return the settings of a small run on two hosts with two ranks each.

    Args:
        every: steps between two checkpoints.
        sections: replace or add whole sections.
    """
    usual: dict[str, object] = {
        "model": MODEL,
        "batch": {"tokens_per_step": 512, "micro_batch": 2, "sequence_length": 64},
        "schedule": {"steps": steps, "warmup_steps": min(3, steps - 1), "max_lr": 3e-3, "min_lr": 3e-4},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": every, "min_free_gb": 0.0},
        "validation": {"every": 0},
        "samples": {"every": 0},
        "supervisor": {"backoff_seconds": 0.5, "stop_seconds": 30},
    }
    return {**usual, **sections}


@contextlib.contextmanager
def two_hosts(folder: Path, number: int = 0, names: Mapping[str, str] | None = None) -> Iterator[TwoHosts]:
    """Make two hosts, and remove them at the end. The test is skipped if that is not possible here."""
    if (reason := problem()) is not None:
        pytest.skip(reason)  # not Linux, not root, or packages that cannot be installed; the reason says which
    hosts = TwoHosts(folder, number)
    try:
        hosts.start(names)
        yield hosts
    finally:
        hosts.stop()


class HostCommand:
    """A command that runs on a host, on CPUs."""

    def __init__(self, host: Host, words: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """
        Args:
            variables: added to the environment.
        """
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(variables or {})}
        self.process = subprocess.Popen(
            host.command(words),
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def program(self) -> psutil.Process:
        """The process of the command: a child of the one that has entered the host."""
        return psutil.Process(self.process.pid).children()[0]

    def wait_for(self, condition: Callable[[], object], seconds: float = 180) -> None:
        """Wait until the condition is true, which must be before the command ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, (self.process.kill(), self.process.communicate()[0])
            time.sleep(0.1)

    def end(self, seconds: float = 180) -> str:
        """Wait for the end of the command; return its output."""
        return self.process.communicate(timeout=seconds)[0]


def assert_nothing_is_left(hosts: TwoHosts, seconds: float = 60) -> None:
    """Check that both hosts have no process of the project any more, soon after the end of a run."""
    deadline = time.monotonic() + seconds
    while left := [process for host in hosts.all for process in host.matching("ds_gpt2")]:
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.5)
