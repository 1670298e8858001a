"""The records of a run, whatever a crash has done to their file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_gpt2.metrics import first_start, forget_after, planned_steps, read_metrics, read_starts, started_from
from ds_gpt2.pace import timed_of

DAMAGED = ['{"step": 3, "x"', "[1]", '{"step": "3"}', "\0\0\0", "", '{"x": 1}', "\udcff"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [json.dumps({"step": step, "perf/step_ms": 100.0 * step}) for step in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    text = (
        "\n".join([*lines, *DAMAGED, '{"step": 3, "perf/step_ms": null}', '{"step": 4}', '{"step": 5, "y": 1']) + "\n"
    )
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def test_damaged_lines_are_passed_over(file: Path, tmp_path: Path) -> None:
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3, 4]
    assert list(read_metrics(tmp_path / "nothing")) == []
    assert sum(timed.train for timed in timed_of(read_metrics(file))) == pytest.approx(0.3)


def test_what_comes_after_a_step_is_kept_elsewhere(file: Path, tmp_path: Path) -> None:
    def steps(name: str) -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    forget_after(file, 2)
    assert steps("metrics.jsonl") == [1, 2] and steps("metrics_replaced.jsonl") == [3, 4]
    forget_after(file, 0)
    assert steps("metrics.jsonl") == [] and steps("metrics_replaced.jsonl") == [3, 4, 1, 2]
    forget_after(tmp_path / "nothing", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics_replaced.jsonl"]


def test_nothing_is_made_where_nothing_is_replaced(file: Path, tmp_path: Path) -> None:
    forget_after(file, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_first_start_is_when_the_run_began(tmp_path: Path) -> None:
    starts = tmp_path / "starts.jsonl"
    assert first_start(starts) is None
    starts.write_text('{"time": "2026-01-01T01:00:00+0100"}\n{"time": "2026-02-01T00:00:00+0000"}\n')
    assert first_start(starts) == 1767225600
    starts.write_text("{")
    assert first_start(starts) is None


def test_the_starts_say_from_where_and_how_far(tmp_path: Path) -> None:
    file = tmp_path / "starts.jsonl"
    assert (read_starts(file), planned_steps([])) == ([], None)
    file.write_text('{"from_step": 0}\n[1]\n{"from_step": 250, "steps": 1000}\n{"from_step": 2')
    assert started_from(read_starts(file)) == [0, 250]
    assert planned_steps(read_starts(file)) == 1000
    assert planned_steps(read_starts(file)[:1]) is None  # of an earlier version


def test_records_wait_for_room_on_the_disk_and_a_half_written_line_is_taken_back(tmp_path: Path) -> None:
    """A limit on the size of files is a full disk that needs no disk: the kernel writes what fits, then refuses."""
    program = """
import pathlib, resource, signal, sys
from ds_gpt2.metrics import Records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
records = Records(pathlib.Path(sys.argv[1]))
for step in range(1, 4):
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 if step == 2 else 1000, resource.RLIM_INFINITY))
    records.append({"step": step, "x": "y"})
    try:
        records.flush(durable=True)
    except OSError as error:
        print(step, error.strerror, pathlib.Path(sys.argv[1]).stat().st_size)
"""
    file = tmp_path / "metrics.jsonl"
    told = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True).stdout
    assert told == "2 File too large 22\n"
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
