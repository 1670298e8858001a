"""Fixtures of the tests of alerts."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_addresses_of_the_user(alert_home: Path) -> None:
    pass


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    return directory
