"""Runs on two hosts: the same result as on one, and the loss of a part of a host, of a host, or of the link."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launched import PROJECT, launch
from small_run import MODEL
from two_hosts import Host, TwoHosts, problem, two_hosts

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

pytestmark = [pytest.mark.ranks, pytest.mark.extended, pytest.mark.skipif(problem() is not None, reason=str(problem()))]

STEPS = 24
MAIN = str(PROJECT / "ds_gpt2" / "__main__.py")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts") / "pair") as pair:
        yield pair


class Started:
    """A supervised run that host a has started on both hosts."""

    def __init__(self, hosts: TwoHosts, config: Path, *words: str, verb: str = "train", slots: int = 2) -> None:
        self.hosts = hosts
        self.settings = load_settings(config)
        hostfile = config.with_name("hosts")
        hostfile.write_text("".join(f"{host.address} slots={slots}  # {host.name}\n" for host in hosts.all))
        target = str(config) if verb == "train" else str(self.settings.run_dir)
        command = hosts.a.command([sys.executable, MAIN, verb, target, "--hostfile", str(hostfile), *words])
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    @property
    def saved(self) -> int:
        return newest_step(self.settings.checkpoint_dir)

    @property
    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.settings.run_dir / METRICS)), default=0)

    def events(self, kind: str) -> list[Event]:
        with contextlib.suppress(OSError):
            return [event for event in read_journal(self.settings.run_dir) if event.kind == kind]
        return []

    def wait_for(self, condition: Callable[[], object], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, (self.process.kill(), self.process.communicate()[0])
            time.sleep(0.1)

    def end(self, seconds: float = 180) -> str:
        """Wait for the end of the supervisor; return its output."""
        return self.process.communicate(timeout=seconds)[0]

    def ranks(self, host: Host) -> list[psutil.Process]:
        return host.matching("--local_rank=", str(self.settings.run.dir.parent))

    def assert_nothing_is_left(self, seconds: float = 60) -> None:
        """Check that both hosts have no process of the run any more, soon after its end."""
        deadline = time.monotonic() + seconds
        left: list[psutil.Process] = []
        while time.monotonic() < deadline:
            left = [process for host in self.hosts.all for process in host.matching("ds_gpt2")]
            if not left:
                return
            time.sleep(0.5)
        raise AssertionError([process.cmdline() for process in left])


Configure = Callable[..., Path]


@pytest.fixture
def configure(tmp_path: Path, write_config: Callable[..., Path]) -> Configure:
    def write(steps: int = 1_000_000, **sections: object) -> Path:
        usual: dict[str, object] = {
            "model": MODEL,
            "batch": {"tokens_per_step": 512, "micro_batch": 2, "sequence_length": 64},
            "schedule": {"steps": steps, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4},
            "checkpoint": {"dir": str(tmp_path / "checkpoints"), "every": 6, "min_free_gb": 0.0},
            "validation": {"every": 0},
            "samples": {"every": 0},
            "supervisor": {"backoff_seconds": 0.5, "stop_seconds": 30},
        }
        return write_config(tmp_path, **{**usual, **sections})

    return write


def test_a_run_on_two_hosts_equals_the_run_on_one(hosts: TwoHosts, configure: Configure, tmp_path: Path) -> None:
    config = configure(STEPS)
    run = Started(hosts, config)
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    assert f"starting 4 ranks on {hosts.a.address} (2), {hosts.b.address} (2)" in output
    run.assert_nothing_is_left()
    one = Path(tmp_path / "one")
    words = [f"run.dir={one / 'runs'}", f"checkpoint.dir={one / 'checkpoints'}"]
    assert launch(4, "--config", str(config), *words).code == exit_codes.DONE
    assert curve_differences(run.settings.run_dir, one / "runs" / "test") == []
    newest = scan(run.settings.checkpoint_dir)[0]
    assert newest.step == STEPS
    assert checkpoint_differences(newest.path, one / "checkpoints" / "test" / newest.tag) == []


@pytest.mark.parametrize("how", ["one rank", "all ranks"])
def test_killed_ranks_of_the_other_host_are_restarted(hosts: TwoHosts, configure: Configure, how: str) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    for process in run.ranks(hosts.b)[: 1 if how == "one rank" else None]:
        process.kill()
    run.wait_for(lambda: len(run.events("start")) == 2)
    crash = run.events("crash")[0]
    assert "was killed by SIGKILL" in crash.text and ("rank 2" in crash.text or "rank 3" in crash.text)
    saved = run.saved
    run.wait_for(lambda: run.saved > saved)
    run.supervisor.send_signal(signal.SIGINT)
    output = run.end()
    assert run.process.returncode == exit_codes.STOPPED, output
    assert problem_of(scan(run.settings.checkpoint_dir)[0]) is None
    run.assert_nothing_is_left()
