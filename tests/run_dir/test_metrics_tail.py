"""Reading the newest records of ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_files import RunFiles

from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.metrics import read_metrics


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@pytest.mark.parametrize("block", [7, 64, 1000, 1 << 18])
def test_newest_returns_the_last_records_of_the_file(
    files: RunFiles, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_tail, "_BLOCK", block)
    files.train(30)
    file = files.run_dir / "metrics.jsonl"
    all_records = list(read_metrics(file))
    for count in (1, 2, 29, 30, 31, 1000):
        assert metrics_tail.newest(files.run_dir, count) == all_records[-count:]
    with file.open("a") as records:
        records.write('{"step": 31, "time": 1')  # incomplete after a crash
    assert metrics_tail.newest(files.run_dir, 3) == all_records[-3:]
    file.write_text("")
    assert metrics_tail.newest(files.run_dir, 3) == []
    file.unlink()
    assert metrics_tail.newest(files.run_dir, 3) == []


def test_newest_reads_a_limited_number_of_bytes(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_tail, "_BLOCK", 1000)
    monkeypatch.setattr(metrics_tail, "_MAX_BYTES", 3000)
    files.train(1000)
    assert 10 < len(metrics_tail.newest(files.run_dir, 1000)) < 100


@pytest.mark.parametrize("block", [16, 1 << 18])
def test_before_returns_the_last_records_before_a_time(
    files: RunFiles, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has lines of all lengths, incomplete lines, and records of an older version without a time."""
    monkeypatch.setattr(metrics_tail, "_BLOCK", block)
    lines, known = [], []
    for step in range(1, 61):
        record: dict[str, Any] = {"step": step, "time": float(step), "samples/0": "x" * (step * 37 % 200)}
        if step % 11 == 0:
            del record["time"]
        lines.append(json.dumps(record) + "\n")
        known.append(record)
        if step % 13 == 0:
            lines.append('{"step": 5, "ti\n')
    (files.run_dir / "metrics.jsonl").write_text("".join(lines) + '{"step": 61, "time": 61')
    for limit in [0.0, 0.5, 1.0, 1.5, *(float(step) for step in range(2, 61) if step % 11), 60.5, 99.0]:
        expected = [record for record in known if record.get("time", 0.0) < limit and record["step"] < limit]
        found = metrics_tail.before(files.run_dir, limit, 1000)
        assert [record for record in found if "time" in record] == [record for record in expected if "time" in record]
        assert metrics_tail.before(files.run_dir, limit, 5)[-1:] == found[-1:]
