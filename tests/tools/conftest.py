"""Fixtures of the tests that read the files of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_files import RunFiles

from ds_gpt2.checkpoint.naming import LOCK


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """A run with settings only."""
    return RunFiles(tmp_path)


@pytest.fixture
def healthy_run(files: RunFiles) -> RunFiles:
    """A healthy run at step 1000, with a checkpoint of step 950."""
    files.train(1000)
    files.journal("start", 10_000, 0)
    files.save(950)
    files.journal("save", 500, 950)
    files.beat()
    return files


@pytest.fixture
def on_other_host(healthy_run: RunFiles) -> RunFiles:
    """A run in a shared directory whose ranks run on another host; their PIDs are meaningless here."""
    (healthy_run.folder / "checkpoints" / "test" / LOCK).write_text("1 on elsewhere\n")
    healthy_run.beat_on_other_host("training", 1000)
    return healthy_run


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()
