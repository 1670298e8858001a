"""Fixtures of the report's tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_files import CONFIG, WriteRun


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes the files of a run and returns its directory."""

    def write(
        records: list[dict[str, Any]],
        starts: Sequence[dict[str, Any]] = (),
        name: str = "test",
        preset: str = "7M",
    ) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        config = CONFIG.replace("NAME", name).replace("PRESET", preset).replace("RUNS", str(tmp_path / "runs"))
        (directory / "config.yaml").write_text(config.replace("CHECKPOINTS", str(tmp_path / "checkpoints")))
        for file, lines in (("metrics.jsonl", records), ("starts.jsonl", starts)):
            (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    return write
