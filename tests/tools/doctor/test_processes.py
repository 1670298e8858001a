"""Checks for other training processes, with real processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from ds_gpt2.common.locks import lock
from ds_gpt2.config.settings import Settings, dump_settings
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord
from ds_gpt2.tools.doctor import processes


@contextlib.contextmanager
def waiting(*command: str | Path, cwd: Path | None = None) -> Iterator[int]:
    """Start a process, wait for its first line of output, and yield its id."""
    words = [sys.executable, "-u", *map(str, command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=cwd) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def test_ranks_of_this_and_other_runs_are_found(script: Path, settings: Settings) -> None:
    with (
        waiting(script, "--local_rank=0", "--config", "x/mine.yaml", "run.name=test") as mine,
        waiting("train.py", "--local_rank=0", "--config", "runs/other/config.yaml", cwd=script.parent) as other,
        waiting("-c", "import time; print('up', flush=True); time.sleep(600)", script),
    ):
        found = processes.find_ranks(script)
        assert {rank.pid: rank.run for rank in found} == {mine: "test", other: "other"}
        this, others = processes.this_run(settings, found), processes.other_runs(settings, found)
        assert (this.status, f"kill -TERM {mine}`" in this.fix) == ("fail", True)
        assert (others.status, f"processes {other} train other" in others.found) == ("warn", True)
        settings.checkpoint_dir.mkdir(parents=True)
        with lock(settings.checkpoint_dir / "lock", "the run"):  # by rank 0, which may be on another machine
            row = processes.this_run(settings, found)
        assert row.found == f"test is being trained by processes {mine}" and str(os.getpid()) not in row.fix
        settings.run_dir.mkdir(parents=True)
        SupervisorRecord(1, 0.0, socket.gethostname(), "running", 1, group=mine).write(settings.run_dir)
        assert "still run without a supervisor" in processes.this_run(settings, found).found
        assert processes.this_run(settings, found).status == "warn"
    assert processes.find_ranks(script) == []


def test_a_run_of_the_same_name_in_another_directory_is_another_run(
    script: Path, settings: Settings, tmp_path: Path
) -> None:
    config, run = tmp_path / "test.yaml", settings.run_dir
    config.write_text(dump_settings(settings), encoding="utf-8")
    folder = run.parent.relative_to(run.parents[1])
    with (
        waiting(script, "--config", "test.yaml", "run.dir=elsewhere", cwd=tmp_path) as other,
        waiting(script, "--config", "moved/test.yaml", cwd=tmp_path) as missing,
        waiting(script, "--config", config, f"run.dir={folder}", cwd=run.parents[1]) as mine,
        waiting(script, "--run_name", "test", "--config") as unknown,
    ):
        ranks = {rank.pid: rank for rank in processes.find_ranks(script)}
        assert ranks[other].run_dir == tmp_path / "elsewhere" / "test" and not ranks[other].trains(settings)
        assert ranks[mine].run_dir == run and ranks[mine].trains(settings)
        assert ranks[missing] == processes.Rank(missing, "test") and ranks[missing].trains(settings)
        assert ranks[unknown] == processes.Rank(unknown, "an unknown run")
        assert f"train {tmp_path}/elsewhere/test" in processes.other_runs(settings, [ranks[other]]).found
        assert processes.this_run(settings, [ranks[other]]).status == "ok"


def test_a_locked_or_supervised_run_is_reported(settings: Settings) -> None:
    settings.checkpoint_dir.mkdir(parents=True)
    settings.run_dir.mkdir(parents=True)
    assert processes.this_run(settings, []).status == "ok"
    with lock(settings.checkpoint_dir / "lock", "the run"):
        row = processes.this_run(settings, [])
        assert (row.status, f"process {os.getpid()} on" in row.found) == ("fail", True)
        assert row.fix == f"wait until it ends, or stop it (it saves first): `touch {settings.run_dir / 'STOP'}`"
    assert processes.this_run(settings, []).status == "ok"
    process = psutil.Process()
    SupervisorRecord(process.pid, process.create_time(), socket.gethostname(), "running", 4).write(settings.run_dir)
    row = processes.this_run(settings, [])
    stop = f"wait until it ends, or stop it (it saves first): `touch {settings.run_dir / 'STOP'}`"
    assert row.status == "fail" and row.fix.startswith(stop)
    SupervisorRecord(process.pid, process.create_time(), "another host", "running", 4).write(settings.run_dir)
    assert processes.this_run(settings, []).status == "warn"
    assert processes.this_run(settings, [], is_one_of_several=True).status == "ok"  # the supervisor's machine decides


def test_a_copy_of_a_supervised_run_can_be_resumed(settings: Settings) -> None:
    (settings.run_dir / "supervisor").mkdir(parents=True)
    process, original = psutil.Process(), settings.run_dir.with_name("original")
    with lock(settings.run_dir / "supervisor" / "lock", "the run"):
        SupervisorRecord(process.pid, process.create_time(), socket.gethostname(), "running", 4).write(settings.run_dir)
        assert processes.this_run(settings, []).status == "fail"
        settings.run_dir.rename(original)
        shutil.copytree(original, settings.run_dir)
        assert processes.this_run(settings, []).status == "ok"


def test_a_run_that_another_machine_supervises_is_refused_while_its_lease_is_valid(settings: Settings) -> None:
    settings.run_dir.mkdir(parents=True)
    SupervisorRecord(12, 1.0, "elsewhere", "running", 4, renewed=1.0).write(settings.run_dir)
    row = processes.this_run(settings, [])
    assert row.status == "fail"
    assert row.found.startswith("test is supervised by process 12 on elsewhere, last seen ")
    assert row.fix.endswith("; if that machine is lost, wait 1m")
    os.utime(settings.run_dir / "supervisor.json", (1e9, 1e9))
    assert processes.this_run(settings, []).status == "ok"
