"""A whole project, trained, then copied, moved and renamed as people do, by its own commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SEQUENCE
from launched import PROJECT, Launched, run
from test_preflight import tree


def command(project: Path, *words: str, cwd: Path | None = None) -> Launched:
    """``./launch.sh WORDS`` in ``project``, without its installation."""
    program = ["bash", "-c", 'cd "$1" && shift && exec "$@"', "bash", str(cwd or project)]
    return run([*program, sys.executable, str(project / "ds_gpt2" / "__main__.py"), *words])


def steps_of(project: Path, name: str) -> list[int]:
    lines = (project / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def original(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project directory with data and a run of its own."""
    project = tmp_path_factory.mktemp("projects") / "one"
    without = shutil.ignore_patterns("__pycache__")
    for part in ("ds_gpt2", "ds_configs"):
        shutil.copytree(PROJECT / part, project / part, ignore=without)
    shutil.copytree(dataset_dir, project / "data" / "mine")
    settings = {
        "run": {"device": "cpu"},
        "model": {"layers": 2, "heads": 2, "width": 32},
        "data": {"dir": "data/mine"},
        "batch": {"tokens_per_step": 16 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE},
        "schedule": {"steps": 8, "warmup_steps": 3},
        "checkpoint": {"every": 2, "keep_last": 3},
        "validation": {"every": 4, "tokens": 8 * SEQUENCE},
        "samples": {"every": 0},
    }
    (project / "ds_configs" / "mine.yaml").write_text(yaml.safe_dump(settings))
    done = command(project, "train", "mine", "--num_gpus", "2")
    assert done.code == 0, done.output
    return project


def test_a_copied_project_is_another_one(original: Path) -> None:
    copy = original.with_name("two")
    shutil.copytree(original, copy)
    before = tree(original)
    resumed = command(copy, "resume", "mine", "schedule.steps=12", "--num_gpus", "2", cwd=original)
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


def test_a_moved_project_resumes_and_a_renamed_run_too(original: Path) -> None:
    source = original.with_name("source")
    shutil.copytree(original, source)
    moved = original.with_name("moved")
    os.rename(source, moved)
    os.rename(moved / "runs" / "mine", moved / "runs" / "renamed")
    before = tree(moved)
    half = command(moved, "resume", "renamed", "schedule.steps=12", "--num_gpus", "2")
    assert half.code == 2
    assert half.output.count("\n") == 1 and "checkpoints/mine: move that directory" in half.output
    assert tree(moved) == before
    os.rename(moved / "checkpoints" / "mine", moved / "checkpoints" / "renamed")
    resumed = command(moved, "resume", "renamed", "schedule.steps=12", "--num_gpus", "2")
    assert resumed.code == 0, resumed.output
    assert steps_of(moved, "renamed") == list(range(1, 13))
    assert not source.exists()
    assert command(moved, "status", "renamed").code == 0
    assert command(moved, "eval", "renamed", "--tokens", str(4 * SEQUENCE)).code == 0


def test_no_file_of_a_project_tells_where_it_was(original: Path) -> None:
    """But for the records of single starts and what logs say, which nothing is resolved by."""
    told = subprocess.run(["grep", "-rlI", str(original), "."], cwd=original, capture_output=True, text=True).stdout
    allowed = {"starts.jsonl", "train.log", "journal.jsonl", "run.json", "data_checked.json", "supervisor.json"}
    assert {Path(line).name for line in told.splitlines()} <= allowed
