"""Runs that several programs train: their data and settings, and starts with the code of an earlier commit."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Source, python_documents


def prepare_manual(directory: Path, first: int, last: int, held_out: int) -> Path:
    """Prepare a dataset from pages ``first`` to ``last`` - 1 of the documentation of Python's standard library.

    Args:
        held_out: one in so many pieces of text goes to the validation split.
    """
    source = Source("manual", [Listed("manual", lambda: itertools.islice(python_documents(), first, last))])
    prepare(source, directory, Recipe(EveryPiece(held_out)), workers=1, progress=False)
    return directory


def write_config(folder: Path, data: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Write the settings of a model that takes milliseconds per step; all files of the run are in ``folder``."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(folder / "runs"), "device": "cpu"},
        "model": {"layers": 2, "heads": 2, "width": 32},
        "data": {"dir": str(data)},
        "checkpoint": {"dir": str(folder / "checkpoints")},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    folder.mkdir(exist_ok=True)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def steps_only(folder: Path, data: Path, preset: str, **overrides: object) -> dict[str, object]:
    """Return the overrides for a run named ``run`` of training steps only, without evaluations and checkpoints."""
    return {
        "run.name": "run",
        "run.dir": folder / "runs",
        "checkpoint.dir": folder / "checkpoints",
        "data.dir": data.absolute(),
        "model.preset": preset,
        **{f"{section}.every": 0 for section in ("checkpoint", "validation", "samples", "hellaswag", "histograms")},
        **overrides,
    }


@contextlib.contextmanager
def checked_out(commit: str, directory: Path) -> Iterator[Path]:
    """Check out ``commit`` of this project to ``directory``, and remove it at the end."""
    subprocess.run(["git", "-C", PROJECT_DIR, "worktree", "add", "--detach", directory, commit], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["git", "-C", PROJECT_DIR, "worktree", "remove", "--force", directory], check=True)


def start_ranks(project: Path, ranks: int, arguments: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    """Start ``train.py`` of ``project``, which may be an earlier commit, on gloo ranks.

    Args:
        streams: stdout and stderr of the processes.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(project / "ds_gpt2" / "train.py")]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(project)}
    return subprocess.Popen([*command, *arguments], env=environment, cwd=project, **streams)
