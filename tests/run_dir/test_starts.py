"""The records of the starts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.run_dir.starts import (
    append_start,
    first_start,
    last_start,
    planned_steps,
    read_starts,
    started_from,
    time_of,
)


def test_the_first_start_is_the_start_of_the_run(tmp_path: Path) -> None:
    starts = tmp_path / "starts.jsonl"
    assert first_start(tmp_path) is None
    starts.write_text('{"time": "2026-01-01T01:00:00+0100"}\n{"time": "2026-02-01T00:00:00+0000"}\n')
    assert first_start(tmp_path) == 1767225600
    starts.write_text("{")
    assert first_start(tmp_path) is None


def test_the_starts_have_their_first_step_and_the_planned_steps(tmp_path: Path) -> None:
    file = tmp_path / "starts.jsonl"
    assert (read_starts(tmp_path), planned_steps([])) == ([], None)
    file.write_text('{"from_step": 0}\n[1]\n{"from_step": 250, "steps": 1000}\n{"from_step": 2')
    assert started_from(read_starts(tmp_path)) == [0, 250]
    assert planned_steps(read_starts(tmp_path)) == 1000
    assert planned_steps(read_starts(tmp_path)[:1]) is None  # an earlier version


def test_a_start_is_read_back(tmp_path: Path) -> None:
    assert last_start(tmp_path) == {}
    for step in (0, 250):
        append_start(tmp_path, {"time": "2026-01-01T01:00:00+0100", "from_step": step, "command": ["x" * 40_000]})
    assert [start["from_step"] for start in read_starts(tmp_path)] == [0, 250]
    assert last_start(tmp_path) == read_starts(tmp_path)[-1]
    assert time_of(last_start(tmp_path)) == first_start(tmp_path) == 1767225600


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"[]\n", b"5\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_file_has_no_last_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "starts.jsonl").write_bytes(content)
    assert (last_start(tmp_path), first_start(tmp_path)) == ({}, None)


@pytest.mark.parametrize("time", [None, "yesterday", True, -1.0, 1e300, [], "9999-12-31T23:59:59+9999"])
def test_a_start_may_have_no_valid_time(time: object) -> None:
    assert time_of({"time": time}) is None
    assert time_of({}) is None
    assert time_of({"time": 12.5}) == 12.5
