"""Status of a large run and of real runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import Run
from run_files import NOW, RunFiles

from ds_gpt2.run_dir.fork_record import Fork, write_fork
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.supervision.launcher import TRAIN
from ds_gpt2.tools.status.screen import screen
from ds_gpt2.tools.status.status import read_status


def test_large_metrics_file_is_not_read_completely(files: RunFiles) -> None:
    files.train(60_000, **{f"scalar/{number}": number / 7 for number in range(10)})
    size = (files.run_dir / "metrics.jsonl").stat().st_size
    before = _bytes_read()
    status = files.status()
    assert (status.progress.step, status.loss.train_day_before is not None) == (60_000, True)
    assert _bytes_read() - before < 0.1 * size


def _bytes_read() -> int:
    """Return the bytes read by this process, from the kernel."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_status_of_a_fork_counts_its_own_history_only(files: RunFiles) -> None:
    """It was forked at step 1,000, has not trained yet, and its checkpoint remembers losses of the parent."""
    write_fork(files.run_dir, Fork("base", "/base", "rolling_step_001000", 1000, ""))
    files.save(1000, state={"val_loss": 5.5, "val_step": 990, "best_val_loss": 5.0, "best_step": 900})
    files.journal("start", 60, 1000)
    files.beat(step=1000)
    status = files.status()
    assert (status.healthy, status.problems) == (True, [])
    assert (status.progress.step, status.progress.done_share) == (1000, 0.5)
    assert (status.loss.val, status.loss.best_val, status.loss.best_val_step) == (None, None, None)
    assert (status.history.starts, status.history.resumes, status.history.lost_seconds) == (1, 0, 0.0)
    assert "\nforked from base at step 1,000\n" in screen(status)

    (files.run_dir / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "time": NOW - 10 * (1010 - step), "perf/step_ms": 10_000, "val/loss": 6.0}) + "\n"
            for step in range(1001, 1011)
        )
    )
    files.beat(step=1010)
    status = files.status()
    assert status.problems == [] and (status.loss.best_val, status.loss.best_val_step) == (6.0, 1001)
    assert status.progress.left_seconds == pytest.approx(990 * 10, rel=0.01)
    logs = sum(file.stat().st_size for file in files.run_dir.rglob("*") if file.is_file())
    needed = status.disks[0].needed_bytes
    assert needed is not None and 99 * logs < needed < 99 * logs + 20_000  # ten steps have written all of the logs


def test_status_of_a_real_run_on_four_ranks(four_ranks: Run) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    status = read_status(run_dir, time.time())
    assert (status.state, status.healthy, status.problems) == ("finished", True, [])
    assert (status.progress.step, status.progress.steps, status.progress.done_share) == (12, 12, 1.0)
    assert status.loss.train == pytest.approx(statistics.median(record["train/loss"] for record in records))
    assert (status.loss.val, status.loss.val_step) == (records[-1]["val/loss"], 12)
    assert status.checkpoint is not None
    assert (status.checkpoint.tag, status.checkpoint.damage) == ("rolling_step_000012", None)
    assert (status.history.starts, status.history.lost_seconds, status.history.incidents) == (1, 0.0, 0)
    assert status.history.read_back_step is None
    assert all(found.needed_bytes is not None for found in status.disks)


@pytest.mark.slow
def test_real_rank_is_running_until_it_is_killed(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    schedule = {"steps": 1_000_000, "warmup_steps": 3}
    config = write_config(tmp_path, schedule=schedule, samples={"every": 0}, validation={"every": 0})
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "output").open("w") as output:
        rank = subprocess.Popen(
            [sys.executable, str(TRAIN), "--config", str(config)],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(lambda: (tmp_path / "runs" / "test" / "config.yaml").exists())
        _wait_for(lambda: _state(tmp_path) in ("running", "saving", "evaluating"))
        assert read_status(tmp_path / "runs" / "test", time.time()).healthy
    finally:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    assert _state(tmp_path) == "dead"


def _state(folder: Path) -> str:
    return read_status(folder / "runs" / "test", time.time()).state


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
