"""Fixtures that the tests of the doctor share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.config.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, write_config: Callable[..., Path]) -> Settings:
    return load_settings(write_config(tmp_path))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return a train.py that only waits."""
    file = tmp_path / "train.py"
    file.write_text("import sys, time\nprint('up', flush=True)\ntime.sleep(600)\n")
    return file


@pytest.fixture
def copied(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "data"))
