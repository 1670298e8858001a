"""Real disks that become full, read-only, or vanish under a run: file systems of some MB, mounted from files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launched import PROJECT, end_session, start
from small_run import MODEL

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.common.process_start import is_running
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, UNWRITTEN, read_metrics
from ds_gpt2.tools.status.status import look

EVERY = 5


@dataclass
class Disk:
    """A file system of its own."""

    image: Path
    directory: Path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.directory], check=True, capture_output=True)

    def unmount(self) -> None:
        """Vanish, even while files are open."""
        subprocess.run(["umount", "--lazy", self.directory], check=True)

    def fail(self) -> None:
        """Become read-only, as after an error of the medium."""
        subprocess.run(["mount", "-o", "remount,abort", self.directory], check=True)

    def repair(self) -> None:
        self.unmount()
        subprocess.run(["e2fsck", "-y", self.image], check=False, capture_output=True)
        self.mount()

    def fill(self) -> None:
        """Leave no byte free."""
        with contextlib.suppress(OSError), (self.directory / "filler").open("ab", buffering=0) as file:
            for size in (2**20, 2**10, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        (self.directory / "filler").unlink()


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    made: list[Disk] = []

    def make(name: str, megabytes: int = 200) -> Disk:
        disk = Disk(tmp_path / f"{name}.img", tmp_path / name)
        disk.directory.mkdir(exist_ok=True)
        with disk.image.open("wb") as file:
            file.truncate(megabytes << 20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", disk.image], check=True, capture_output=True)
            disk.mount()
        except (OSError, subprocess.CalledProcessError) as error:  # no root, no loop devices, or another system
            pytest.skip(f"needs the right to mount a file as a disk, and mkfs.ext4: {error}")
        made.append(disk)
        return disk

    yield make
    for disk in made:
        while subprocess.run(["mountpoint", "-q", disk.directory]).returncode == 0:
            disk.unmount()


_started: list[Started] = []


@pytest.fixture(autouse=True)
def _end_runs() -> Iterator[None]:
    yield
    while _started:
        end_session(_started.pop().process.pid)


class Started:
    """A run under its supervisor."""

    def __init__(self, config: Path, *words: str) -> None:
        self.settings = load_settings(config)
        command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "train", str(config), "--num_gpus=2"]
        self.process = start([*command, *words])
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

    def end_of_ranks(self) -> bool:
        """Whether no rank is left."""
        beats = [read_beat(self.settings.run_dir, rank) for rank in range(2)]
        return not any(beat is not None and is_running(beat.pid, beat.start) for beat in beats)

    def has_told(self, kind: str) -> bool:
        return bool(self.events(kind))

    def problems(self) -> list[str]:
        return [problem.text for problem in look(self.settings.run_dir, time.time()).problems]

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

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> str:
        """The whole output."""
        try:
            self.output, _ = self.process.communicate(timeout=240)
        finally:
            left = end_session(self.process.pid)
        assert left == []
        return self.output


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    def write(steps: int, runs: Path = tmp_path / "runs", **checkpoint: object) -> Path:
        return write_config(
            tmp_path,
            run={"name": "test", "dir": str(runs), "device": "cpu"},
            model=MODEL,
            schedule={"steps": steps, "warmup_steps": 3},
            checkpoint={
                "dir": str(tmp_path / "checkpoints"),
                "every": EVERY,
                "min_free_gb": 0.0,
                "keep_last": 2,
                **checkpoint,
            },
            samples={"every": 0},
            validation={"every": 0},  # a stop may interrupt it, and the record of that step is then written later
            supervisor={"backoff_seconds": 0.2, "stop_seconds": 60},
            guards={"spike": "off", "divergence": "off"},
        )

    return write


def steps_in(file: Path) -> list[int]:
    return [record["step"] for record in read_metrics(file)]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_run_finishes_while_its_own_disk_takes_nothing_and_its_metrics_are_complete_later(
    make_disk: Callable[[str], Disk], config: Callable[..., Path], how: str
) -> None:
    disk = make_disk("runs")
    run = Started(config(40, **{"async": False, "write_mb_per_s": 20.0}))  # it must not end before the disk is full
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill() if how == "full" else disk.fail()
    if how == "full":  # statvfs does not say that ext4 takes nothing after an error
        assert f"the disk of {run.settings.run_dir} is full" in run.problems()
    output = run.end()
    assert run.process.returncode == exit_report.DONE, output
    assert "Traceback" not in output and "Logging error" not in output
    reserve, metrics = run.settings.checkpoint_dir / UNWRITTEN, run.settings.run_dir / METRICS
    assert steps_in(reserve) != [] and steps_in(metrics) + steps_in(reserve) == list(range(1, 41))
    assert look(run.settings.run_dir, time.time()).state == "finished"
    disk.free() if how == "full" else disk.repair()
    run = Started(config(42), "--auto")
    output = run.end()
    assert run.process.returncode == exit_report.DONE, output
    assert steps_in(metrics) == list(range(1, 43)) and not reserve.exists()


def test_a_full_disk_of_a_run_and_its_checkpoints_costs_no_step(
    make_disk: Callable[[str], Disk], config: Callable[..., Path]
) -> None:
    disk = make_disk("all")
    directories = {"runs": disk.directory / "runs", "dir": str(disk.directory / "checkpoints"), "keep_last": 5}
    run = Started(config(100_000, **directories))
    run.wait_for(lambda: run.saved >= 5 * EVERY)
    disk.fill()
    saved = run.saved
    run.wait_for(lambda: run.saved >= saved + 2 * EVERY)  # older checkpoints give way
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED and "Traceback" not in output, output
    last = run.saved
    disk.free()
    run = Started(config(last + 2, **directories), "--auto")
    output = run.end()
    assert run.process.returncode == exit_report.DONE and f"step {last} of {last + 2}" in output, output
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, last + 3))


def test_checkpoints_whose_disk_vanishes_are_waited_for_and_nothing_is_written_where_it_was(
    make_disk: Callable[[str], Disk], config: Callable[..., Path]
) -> None:
    disk = make_disk("checkpoints")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    saved, step = run.saved, run.step
    disk.unmount()
    run.wait_for(lambda: run.step >= step + 3 * EVERY)
    assert list(disk.directory.iterdir()) == []
    run.kill_rank(1)
    run.wait_for(lambda: run.has_told("no_checkpoints"))
    assert list(disk.directory.iterdir()) == [] and any("mount" in text for text in run.problems())
    disk.mount()
    run.wait_for(lambda: len(run.events("start")) == 2)
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED, output
    assert run.events("start")[1].step >= saved and problem_of(scan(run.settings.checkpoint_dir)[0]) is None
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))


def test_a_run_crashes_and_resumes_while_the_disk_of_its_checkpoints_is_full(
    make_disk: Callable[[str], Disk], config: Callable[..., Path]
) -> None:
    disk = make_disk("checkpoints")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill()
    run.wait_for(lambda: run.has_told("save_failed"))
    run.kill_rank(0)
    run.wait_for(lambda: len(run.events("start")) == 2)
    resumed, failed = run.events("start")[1].step or 0, len(run.events("save_failed"))
    assert resumed >= EVERY
    run.wait_for(lambda: len(run.events("save_failed")) > failed)
    disk.free()
    step = run.step
    run.wait_for(lambda: run.saved > step)
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED, output
    assert sorted(path.name for path in run.settings.checkpoint_dir.iterdir() if ".probe" in path.name) == []


def test_a_run_whose_own_disk_vanishes_continues_and_is_logged_when_it_returns(
    make_disk: Callable[[str], Disk], config: Callable[..., Path]
) -> None:
    disk = make_disk("runs")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    saved = run.saved
    disk.unmount()
    run.wait_for(lambda: run.saved >= saved + 2 * EVERY)
    assert list(disk.directory.iterdir()) == []
    disk.mount()
    away = run.saved
    run.wait_for(lambda: any((event.step or 0) > away for event in run.events("save")))
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED and "Traceback" not in output, output
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))
    assert {saved + EVERY, saved + 2 * EVERY} <= {event.step for event in run.events("save")}
    assert run.problems() == []


def test_a_crash_while_the_disk_of_the_run_is_full_is_followed_by_a_restart_when_it_is_not(
    make_disk: Callable[[str], Disk], config: Callable[..., Path]
) -> None:
    disk = make_disk("runs")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    disk.fill()
    saved = run.saved
    run.wait_for(lambda: run.saved > saved)
    run.kill_rank(1)
    time.sleep(20)  # longer than the back-off: starts would fail meanwhile
    assert run.process.poll() is None and run.end_of_ranks()
    disk.free()
    run.wait_for(lambda: run.saved > saved + 2 * EVERY)
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED and "cannot be written" in output, output
    assert [event.kind for event in run.all_events() if event.kind in ("crash", "not_logged", "restart")] == [
        "crash",
        "restart",
        "not_logged",
    ]
    assert steps_in(run.settings.run_dir / METRICS) == list(range(1, run.saved + 1))


def test_nothing_is_saved_on_the_mount_point_of_a_disk_that_vanished(
    make_disk: Callable[[str], Disk], config: Callable[..., Path], tmp_path: Path
) -> None:
    """The disk is mounted at the very directory of the run's checkpoints."""
    (tmp_path / "checkpoints" / "test").mkdir(parents=True)
    (tmp_path / "checkpoints" / "test" / "readme.txt").touch()
    disk = make_disk("checkpoints/test")
    run = Started(config(100_000))
    run.wait_for(lambda: run.saved >= EVERY)
    disk.unmount()
    run.wait_for(lambda: run.has_told("save_failed"))
    assert [path.name for path in disk.directory.iterdir()] == ["readme.txt"]
    disk.mount()
    step = run.step
    run.wait_for(lambda: run.saved > step)
    output = run.stop()
    assert run.process.returncode == exit_report.STOPPED and "mount the disk again" in output, output
