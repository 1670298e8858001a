"""A complete project with a run: copied, moved and renamed, then used by its own commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from file_tree import tree
from launched import PROJECT, Launched, end_session, run, start

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

SEQUENCE = 16


def command(project: Path, *words: str, cwd: Path | None = None) -> Launched:
    """Run ``./launch.sh WORDS`` of ``project`` with this Python."""
    return run(command_line(project, *words, cwd=cwd))


def command_line(project: Path, *words: str, cwd: Path | None = None) -> list[str]:
    program = ["bash", "-c", 'cd "$1" && shift && exec "$@"', "bash", str(cwd or project)]
    return [*program, sys.executable, str(project / "ds_gpt2" / "__main__.py"), *words]


def steps_of(project: Path, name: str) -> list[int]:
    lines = (project / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def original(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project directory that contains data and a run."""
    project = tmp_path_factory.mktemp("projects") / "one"
    without = shutil.ignore_patterns("__pycache__")
    for part in ("ds_gpt2", "ds_configs"):
        shutil.copytree(PROJECT / part, project / part, ignore=without)
    shutil.copy(PROJECT / "launch.sh", project)
    shutil.copytree(dataset_dir, project / "data" / "mine")
    settings = {
        "run": {"device": "cpu"},
        "model": {"layers": 2, "heads": 2, "width": 32},
        "data": {"dir": "data/mine"},
        "batch": {"tokens_per_step": 4 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE},
        "schedule": {"steps": 8, "warmup_steps": 3},
        "checkpoint": {"every": 2, "keep_last": 3},
        "validation": {"every": 4, "tokens": 8 * SEQUENCE},
        "samples": {"every": 0},
    }
    (project / "ds_configs" / "mine.yaml").write_text(yaml.safe_dump(settings))
    done = command(project, "train", "mine", "--num_gpus", "1")
    assert done.code == 0, done.output
    return project


def test_a_copied_project_leaves_the_original_unchanged(original: Path) -> None:
    copy = original.with_name("two")
    shutil.copytree(original, copy)
    before = tree(original)
    resumed = command(copy, "resume", "mine", "schedule.steps=12", "--num_gpus", "1", cwd=original)
    assert resumed.code == 0, resumed.output
    assert command(copy, "prune", "mine").code == 0
    assert command(copy, "notes", "mine", "of the copy").code == 0
    assert command(copy, "report", "mine").code == 0
    assert command(copy, "export", "mine").code == 0
    assert str(copy / "checkpoints" / "mine") in command(copy, "list", "mine").output
    assert tree(original) == before
    assert steps_of(copy, "mine") == list(range(1, 13))
    assert steps_of(original, "mine") == list(range(1, 9))
    assert list((copy / "runs" / "mine" / "exports").iterdir())


def test_a_moved_project_and_a_renamed_run_resume(original: Path) -> None:
    source = original.with_name("source")
    shutil.copytree(original, source)
    moved = original.with_name("moved")
    os.rename(source, moved)
    os.rename(moved / "runs" / "mine", moved / "runs" / "renamed")
    before = tree(moved)
    half = command(moved, "resume", "renamed", "schedule.steps=12", "--num_gpus", "1")
    assert half.code == 2
    assert half.output.count("\n") == 1 and "checkpoints/mine: move that directory" in half.output
    assert tree(moved) == before
    os.rename(moved / "checkpoints" / "mine", moved / "checkpoints" / "renamed")
    resumed = command(moved, "resume", "renamed", "schedule.steps=12", "--num_gpus", "1")
    assert resumed.code == 0, resumed.output
    assert steps_of(moved, "renamed") == list(range(1, 13))
    assert not source.exists()
    assert command(moved, "status", "renamed").code == 0
    assert command(moved, "eval", "renamed", "--tokens", str(4 * SEQUENCE)).code == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_project_that_is_moved_while_it_trains_resumes_in_the_new_directory(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_GPT2_PYTHON", sys.executable)
    here, there = original.with_name("here"), original.with_name("there")
    shutil.copytree(original, here)
    settings = ["schedule.steps=10000", "checkpoint.every=1000", "validation.every=50", "run.name=long"]
    process = start(command_line(here, "train", "mine", "--num_gpus", "2", *settings))
    try:
        wait_for(lambda: (here / "runs" / "long" / "starts.jsonl").exists())
        wait_for(lambda: (here / "runs" / "long" / "metrics.jsonl").stat().st_size > 0)
        os.rename(here, there)
        (here / "runs" / "long").mkdir(parents=True)  # a new directory at the old path
        starts = there / "runs" / "long" / "starts.jsonl"
        wait_for(lambda: len(starts.read_text().splitlines()) == 2)
        (there / "runs" / "long" / "STOP").touch()
        output, _ = process.communicate(timeout=600)
    finally:
        left = end_session(process.pid)
    assert process.returncode == 3 and left == [], output
    assert f"{here}/runs/long was moved to {there}/runs/long while the run trained: stopping" in output
    assert f"was moved to {there}/runs/long: resuming there" in output
    assert "Traceback" not in output
    again = json.loads(starts.read_text().splitlines()[1])
    assert again["run_dir"] == str(there / "runs" / "long") and again["from_step"] > 0
    steps = steps_of(there, "long")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= again["from_step"]
    assert list((here / "runs" / "long").iterdir()) == []
    assert list((there / "runs" / "long").glob("**/*.tmp")) == []


def test_a_run_saves_into_its_checkpoint_directory_after_that_was_moved_alone(original: Path) -> None:
    project = original.with_name("parts")
    shutil.copytree(original, project)
    settings = ["schedule.steps=10000", "checkpoint.every=1000", "validation.every=50", "run.name=long"]
    process = start(command_line(project, "train", "mine", "--num_gpus", "1", *settings))
    try:
        metrics = project / "runs" / "long" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        os.rename(project / "checkpoints" / "long", project / "elsewhere")
        output, _ = process.communicate(timeout=600)
    finally:
        end_session(process.pid)
    assert process.returncode == 3, output
    assert f"{project}/checkpoints/long was moved to {project}/elsewhere while the run trained: stopping" in output
    assert not (project / "checkpoints" / "long").exists()
    saved = sorted(path.name for path in (project / "elsewhere").glob("rolling_step_*"))
    assert saved[-1] == f"rolling_step_{steps_of(project, 'long')[-1]:06d}"


def test_no_file_of_a_project_depends_on_its_path(original: Path) -> None:
    """Only logs and the records of single starts contain the path; no path is resolved from them."""
    files = subprocess.run(["grep", "-rlI", str(original), "."], cwd=original, capture_output=True, text=True).stdout
    allowed = {"starts.jsonl", "train.log", "journal.jsonl", "run.json", "data_checked.json", "supervisor.json"}
    assert {Path(line).name for line in files.splitlines()} <= allowed
