"""Runs on real disks that become full, read-only, or are unmounted: small file systems mounted from files."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import LoopDisk, loop_disks
from launched import PROJECT, end_session, start
from small_run import MODEL

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.common.process_identity import is_running
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, UNWRITTEN, read_metrics
from ds_gpt2.tools.status.status import read_status

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

EVERY = 5


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[..., LoopDisk]]:
    """Create and mount a disk with a given name."""
    with loop_disks(tmp_path) as make:
        yield make


_started: list[Started] = []


@pytest.fixture(autouse=True)
def _end_runs() -> Iterator[None]:
    yield
    while _started:
        end_session(_started.pop().process.pid)


class Started:
    """A supervised run."""

    def __init__(self, config: Path, *words: str, ranks: int = 2) -> None:
        self.settings = load_settings(config)
        self.ranks = ranks
        program = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]
        self.process = start([*program, "train", str(config), f"--num_gpus={ranks}", *words])
        _started.append(self)
        self.output = ""

    @property
    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.settings.run_dir / METRICS)), default=0)

    @property
    def saved(self) -> int:
        return newest_step(self.settings.checkpoint_dir)

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_journal(self.settings.run_dir) if event.kind == kind]

    def all_events(self) -> list[Event]:
        return list(read_journal(self.settings.run_dir))

    def ranks_have_ended(self) -> bool:
        """Return whether no rank is running."""
        beats = [read_beat(self.settings.run_dir, rank) for rank in range(self.ranks)]
        return not any(beat is not None and is_running(beat.pid, beat.start) for beat in beats)

    def has_event(self, kind: str) -> bool:
        return bool(self.events(kind))

    def problems(self) -> list[str]:
        return [problem.text for problem in read_status(self.settings.run_dir, time.time()).problems]

    def kill_rank(self, rank: int) -> None:
        beat = read_beat(self.settings.run_dir, rank)
        assert beat is not None
        os.kill(beat.pid, signal.SIGKILL)

    def wait_for(self, condition: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, (self.process.kill(), self.end())
            time.sleep(0.05)

    def wait_for_output(self, text: str, seconds: float = 240) -> None:
        """Wait until ``text`` is in the output; ``events`` cannot show it while the disk of the run is full."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()  # ``communicate`` would miss what the stream has buffered
        deadline = time.monotonic() + seconds
        while text not in self.output:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([pipe], [], [], left)[0], self.output
            read = os.read(pipe, 65_536)
            assert read, self.output
            self.output += read.decode(errors="replace")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> str:
        """Wait for the end of the run and return its output."""
        try:
            self.output += self.process.communicate(timeout=240)[0]
        finally:
            remaining = end_session(self.process.pid)
        assert remaining == []
        return self.output


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    def write(steps: int, runs: Path = tmp_path / "runs", **checkpoint: object) -> Path:
        return write_config(
            tmp_path,
            run={"name": "test", "dir": str(runs), "device": "cpu"},
            model=MODEL,
            batch={"tokens_per_step": 64, "micro_batch": 2, "sequence_length": 16},
            schedule={"steps": steps, "warmup_steps": 3},
            checkpoint={
                "dir": str(tmp_path / "checkpoints"),
                "every": EVERY,
                "min_free_gb": 0.0,
                "keep_last": 2,
                **checkpoint,
            },
            samples={"every": 0},
            validation={"every": 0},  # a stop may interrupt it: then the record of its step is written later
            supervisor={"backoff_seconds": 0.2, "stop_seconds": 60},
            guards={"spike": "off", "divergence": "off"},
        )

    return write


def steps_in(file: Path) -> list[int]:
    return [record["step"] for record in read_metrics(file)]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_run_finishes_while_its_disk_is_not_writable_and_completes_its_metrics_later(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path], how: str
) -> None:
    disk = make_disk("runs")
    run = Started(
        config(40, **{"async": False, "write_mb_per_s": 20.0}), ranks=1
    )  # slow enough not to end before the disk is full
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill() if how == "full" else disk.fail()
    if how == "full":  # statvfs does not report that ext4 is read-only after an error
        assert f"the disk of {run.settings.run_dir} is full" in run.problems()
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    assert "Traceback" not in output and "Logging error" not in output
    fallback_file, metrics = run.settings.checkpoint_dir / UNWRITTEN, run.settings.run_dir / METRICS
    assert steps_in(fallback_file) != [] and steps_in(metrics) + steps_in(fallback_file) == list(range(1, 41))
    assert read_status(run.settings.run_dir, time.time()).state == "finished"
    disk.free() if how == "full" else disk.repair()
    run = Started(config(42), "--auto", ranks=1)
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    assert steps_in(metrics) == list(range(1, 43)) and not fallback_file.exists()


def test_a_full_disk_of_a_run_and_its_checkpoints_costs_no_step(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path]
) -> None:
    disk = make_disk("all")
    directories = {"runs": disk.directory / "runs", "dir": str(disk.directory / "checkpoints"), "keep_last": 5}
    run = Started(config(100_000, **directories), ranks=1)
    run.wait_for(lambda: run.saved >= 5 * EVERY)
    disk.fill()
    saved = run.saved
    run.wait_for(lambda: run.saved >= saved + 2 * EVERY)  # older checkpoints are deleted
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED and "Traceback" not in output, output
    last = run.saved
    disk.free()
    run = Started(config(last + 2, **directories), "--auto", ranks=1)
    output = run.end()
    assert run.process.returncode == exit_codes.DONE and f"step {last} of {last + 2}" in output, output
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, last + 3))


def test_a_run_waits_for_checkpoints_on_an_unmounted_disk_and_writes_nothing_below_it(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path]
) -> None:
    disk = make_disk("checkpoints")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    saved, step = run.saved, run.step
    disk.unmount()
    run.wait_for(lambda: run.step >= step + 3 * EVERY)
    assert list(disk.directory.iterdir()) == []
    run.kill_rank(1)
    run.wait_for(lambda: run.has_event("no_checkpoints"))
    assert list(disk.directory.iterdir()) == [] and any("mount" in text for text in run.problems())
    disk.mount()
    run.wait_for(lambda: len(run.events("start")) == 2)
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED, output
    assert (run.events("start")[1].step or 0) >= saved and problem_of(scan(run.settings.checkpoint_dir)[0]) is None
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))


def test_a_run_crashes_and_resumes_while_the_disk_of_its_checkpoints_is_full(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path]
) -> None:
    disk = make_disk("checkpoints")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill()
    run.wait_for(lambda: run.has_event("save_failed"))
    run.kill_rank(0)
    run.wait_for(lambda: len(run.events("start")) == 2)
    resumed, failed = run.events("start")[1].step or 0, len(run.events("save_failed"))
    assert resumed >= EVERY
    run.wait_for(lambda: len(run.events("save_failed")) > failed)
    disk.free()
    step = run.step
    run.wait_for(lambda: run.saved > step)
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED, output
    assert sorted(path.name for path in run.settings.checkpoint_dir.iterdir() if ".probe" in path.name) == []


def test_a_run_on_an_unmounted_disk_continues_and_writes_its_records_when_the_disk_is_mounted_again(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path]
) -> None:
    disk = make_disk("runs")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    saved = run.saved
    disk.unmount()
    run.wait_for(lambda: run.saved >= saved + 2 * EVERY)
    assert list(disk.directory.iterdir()) == []
    disk.mount()
    while_unmounted = run.saved
    run.wait_for(lambda: any((event.step or 0) > while_unmounted for event in run.events("save")))
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED and "Traceback" not in output, output
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))
    assert {saved + EVERY, saved + 2 * EVERY} <= {event.step for event in run.events("save")}
    assert run.problems() == []


def test_after_a_crash_the_run_restarts_when_its_full_disk_has_free_space_again(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path]
) -> None:
    disk = make_disk("runs")
    run = Started(config(100_000), ranks=1)
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill()
    saved = run.saved
    run.wait_for(lambda: run.saved > saved)
    run.kill_rank(0)
    run.wait_for_output("the run restarts when this is fixed")
    assert run.process.poll() is None and run.ranks_have_ended()
    disk.free()
    run.wait_for(lambda: run.saved > saved + 2 * EVERY)
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED and "cannot be written" in output, output
    assert [event.kind for event in run.all_events() if event.kind in ("crash", "not_logged", "restart")] == [
        "crash",
        "restart",
        "not_logged",
    ]
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))


def test_nothing_is_saved_on_the_mount_point_of_an_unmounted_disk(
    make_disk: Callable[..., LoopDisk], config: Callable[..., Path], tmp_path: Path
) -> None:
    """The disk is mounted at the directory of the run's checkpoints."""
    (tmp_path / "checkpoints" / "test").mkdir(parents=True)
    (tmp_path / "checkpoints" / "test" / "readme.txt").touch()
    disk = make_disk("checkpoints/test")
    run = Started(config(100_000), ranks=1)
    run.wait_for(lambda: run.saved >= EVERY)
    disk.unmount()
    run.wait_for(lambda: run.has_event("save_failed"))
    assert [path.name for path in disk.directory.iterdir()] == ["readme.txt"]
    disk.mount()
    step = run.step
    run.wait_for(lambda: run.saved > step)
    output = run.stop()
    assert run.process.returncode == exit_codes.STOPPED and "mount the disk again" in output, output
