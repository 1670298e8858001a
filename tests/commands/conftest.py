"""Fixtures of the commands: a project directory, runs with checkpoints, an exported model, and calls of a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_files import write_checkpoint
from exported_model import TAG
from launched import Launched
from project_dir import add_run, use_as_project

from ds_gpt2 import cli
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.pretrained.load import as_model
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.models.open import open_model


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that the commands use as the project directory."""
    use_as_project(tmp_path / "project", monkeypatch)
    (tmp_path / "project" / "runs").mkdir(parents=True)
    return tmp_path / "project"


@pytest.fixture
def run_with(project: Path) -> Callable[..., Path]:
    """Create a run with checkpoint settings; return its directory of checkpoints."""

    def make(name: str = "test", **settings: object) -> Path:
        directory = project / "checkpoints" / name
        directory.mkdir(parents=True)
        tree = {
            "run": {"name": name, "dir": str(project / "runs")},
            "model": {"preset": "7M"},
            "data": {"dir": "data"},
            "schedule": {"steps": 1000},
            "checkpoint": {"dir": str(project / "checkpoints"), **settings},
        }
        add_run(project, name, yaml.safe_dump(tree))
        return directory

    return make


@pytest.fixture
def history(run_with: Callable[..., Path]) -> Path:
    """Three rolling checkpoints; the newest is also an epoch checkpoint and the second is the best."""
    directory = run_with(keep_last=2, keep_epochs=1)
    for step in (100, 200, 300):
        write_checkpoint(directory, rolling_tag(step), step)
    commit.link(Disk(), directory / rolling_tag(300), directory, "epoch_00001")
    commit.link(Disk(), directory / rolling_tag(200), directory, "best_model")
    commit.point_to(Disk(), directory, rolling_tag(200))
    commit.point_to(Disk(), directory, rolling_tag(300))
    return directory


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call a command; return its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def in_json(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, Any]]:
    """Call a command with ``--json``; return its exit code and the parsed output."""

    def call(*arguments: object) -> tuple[int, Any]:
        code, out, _ = command(*arguments, "--json")
        return code, json.loads(out)

    return call


@pytest.fixture(scope="session")
def exported(four_ranks: tuple[Launched, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a run on four ranks, and a Hugging Face directory exported from it."""
    out = tmp_path_factory.mktemp("export") / "hf"
    assert cli.main(["export", str(four_ranks[1] / "runs" / "test"), "--out", str(out)]) == exit_codes.DONE
    return four_ranks[1], out


@pytest.fixture(scope="session")
def model(exported: tuple[Path, Path]) -> GPT2:
    """Return the model of the run, from the engine's fp32 weights."""
    opened = open_model(str(exported[0] / "runs" / "test"), TAG)
    return as_model(opened.shape, opened.weights)
