"""Models of transformers on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrained_helpers import make  # imported late: it skips the calling test without transformers

    return make(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))
