"""A temporary directory that the commands use as the project directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.commands import checkpoints
from ds_gpt2.config import lookup, run_location
from ds_gpt2.tools.resources import run_checkpoints


def use_as_project(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``directory`` the project directory, in which runs, settings files and checkpoints are found."""
    for module in (checkpoints, lookup, run_checkpoints, run_location):
        monkeypatch.setattr(module, "PROJECT_DIR", directory)


def add_run(project: Path, name: str, config: str) -> Path:
    """Create the directory of a run with its settings: ``config`` with NAME and FOLDER replaced."""
    run_dir = project / "runs" / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.replace("FOLDER", str(project)).replace("NAME", name))
    return run_dir
