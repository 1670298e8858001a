"""The file that asks a run to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.open_directory import OpenDirectory
from ds_gpt2.stop import STOP_FILE, StopRequest


def test_the_file_is_removed_when_the_request_is_met(tmp_path: Path) -> None:
    request = StopRequest(OpenDirectory(tmp_path))
    (tmp_path / STOP_FILE).touch()
    assert request.requested
    request.clear()
    request.clear()
    assert not request.requested


def test_a_request_that_cannot_be_removed_is_reported_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = StopRequest(OpenDirectory(tmp_path))
    (tmp_path / STOP_FILE).mkdir()
    request.clear()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / STOP_FILE / "mine").mkdir(parents=True)
    request.clear()
    assert request.requested and "STOP cannot be removed" in caplog.text and (tmp_path / STOP_FILE / "mine").is_dir()
