"""The metrics of a run, also after crashes and on full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_gpt2.monitoring.pace import timed_of
from ds_gpt2.run_dir.metrics import MetricsFile, drop_after, read_metrics

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


def test_damaged_lines_are_skipped(file: Path, tmp_path: Path) -> None:
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3, 4]
    assert list(read_metrics(tmp_path / "nothing")) == []
    assert sum(timed.train for timed in timed_of(read_metrics(file))) == pytest.approx(0.3)


def test_records_after_a_step_are_moved(file: Path, tmp_path: Path) -> None:
    def steps(name: str) -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    drop_after(file, 2)
    assert steps("metrics.jsonl") == [1, 2] and steps("metrics_replaced.jsonl") == [3, 4]
    drop_after(file, 0)
    assert steps("metrics.jsonl") == [] and steps("metrics_replaced.jsonl") == [3, 4, 1, 2]
    drop_after(tmp_path / "nothing", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics_replaced.jsonl"]


def test_no_file_is_created_if_no_record_is_moved(file: Path, tmp_path: Path) -> None:
    drop_after(file, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_records_wait_for_free_space_and_an_incomplete_line_is_removed(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: the kernel writes what fits, then refuses."""
    program = """
import pathlib, resource, signal, sys
from ds_gpt2.run_dir.metrics import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
records = MetricsFile(pathlib.Path(sys.argv[1]))
for step in range(1, 4):
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 if step == 2 else 1000, resource.RLIM_INFINITY))
    records.append({"step": step, "x": "y"})
    try:
        records.flush(durable=True)
    except OSError as error:
        print(step, error.strerror, pathlib.Path(sys.argv[1]).stat().st_size)
"""
    file = tmp_path / "metrics.jsonl"
    output = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    ).stdout
    assert output == "2 File too large 22\n"
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]


@contextlib.contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """Prevent files larger than ``limit`` bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def steps_in(file: Path) -> list[int]:
    return [record["step"] for record in read_metrics(file)]


def unable_to_write(records: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(durable: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "_write", fail)


def test_records_that_cannot_be_written_are_saved_beside_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fallback_file = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "unwritten.jsonl"
    fallback_file.parent.mkdir()
    records = MetricsFile(file, lambda: fallback_file)
    records.append({"step": 1})
    records.flush(durable=True)
    assert not fallback_file.exists()
    unable_to_write(records, monkeypatch)
    for step in (2, 3):
        records.append({"step": step})
    with pytest.raises(OSError, match="No space left"):
        records.flush()
    assert (
        records.unsaved == 2 and not fallback_file.exists()
    )  # the reserve is written only at a checkpoint and at the end
    with pytest.raises(OSError, match="No space left"):
        records.flush(durable=True)
    assert records.unsaved == 0 and steps_in(fallback_file) == [2, 3]
    records.append({"step": 4})
    assert records.unsaved == 1
    records.close()

    after = MetricsFile(file, lambda: fallback_file, step=2)  # resumes from step 2
    assert after.unsaved == 0
    after.append({"step": 3})
    after.flush(durable=True)
    assert steps_in(file) == [1, 2, 3] and not fallback_file.exists()


def test_records_that_are_not_durable_are_saved_beside_the_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems may report a full disk only at fsync."""
    file, fallback_file = tmp_path / "metrics.jsonl", tmp_path / "unwritten.jsonl"
    records = MetricsFile(file, lambda: fallback_file)
    records.append({"step": 1})
    records.flush()
    records.append({"step": 2})

    def fail(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr("ds_gpt2.run_dir.metrics.os.fsync", fail)
        with pytest.raises(OSError, match="quota"):
            records.flush(durable=True)
    assert steps_in(fallback_file) == [1, 2] and steps_in(file) == [1] and records.unsaved == 0
    records.flush()
    assert fallback_file.exists()  # until all records are durable
    records.append({"step": 3})
    assert records.unsaved == 1
    records.flush(durable=True)
    assert steps_in(file) == [1, 2, 3] and not fallback_file.exists()


def test_metrics_that_are_deleted_on_a_full_disk_are_restored_when_there_is_space(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = MetricsFile(file)
    for step in range(1, 1001):
        records.append({"step": step, "text": "x" * 50})
    records.flush()
    file.unlink()
    records.append({"step": 1001})
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        records.flush()
    assert list(tmp_path.iterdir()) == [] and records.unsaved == 1
    records.flush()
    assert steps_in(file) == list(range(1, 1002))


def test_a_last_line_without_a_line_end_is_a_record(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}')
    drop_after(file, 5)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    file.write_text('{"step": 1}\n{"step": 2}')
    drop_after(file, 1)
    assert file.read_text() == '{"step": 1}\n' and (tmp_path / "metrics_replaced.jsonl").read_text() == '{"step": 2}\n'


def test_replaced_records_are_moved_to_the_fallback_file_if_the_disk_is_full(file: Path, tmp_path: Path) -> None:
    fallback_file = tmp_path / "checkpoints" / "unwritten.jsonl"
    fallback_file.parent.mkdir()
    replaced = file.with_name("metrics_replaced.jsonl")
    replaced.mkdir()  # simulates a disk that is not writable
    fallback_file.write_text('{"step": 2}\n{"step": 5}\n')
    drop_after(file, 2, fallback_file)
    assert steps_in(file) == [1, 2] and steps_in(fallback_file.with_name(replaced.name)) == [3, 4, 5]
    with pytest.raises(OSError, match="Is a directory"):
        drop_after(file, 1)
    assert steps_in(file) == [1, 2]  # no record is deleted before it is moved


def test_nothing_is_written_if_no_record_is_moved(file: Path) -> None:
    with full_disk():
        drop_after(file, 9)
    assert steps_in(file) == [1, 2, 3, 4] and b"y" not in file.read_bytes()


def test_metrics_deleted_during_a_run_are_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    records = MetricsFile(file)

    def record(step: int) -> None:
        records.append({"step": step})
        records.flush()

    record(1)
    file.unlink()
    record(2)
    assert steps_in(file) == [1, 2] and "deleted or replaced while the run trains" in caplog.text
    file.rename(file.with_name("rotated"))
    file.write_text('{"step": 2}\n')  # a file of the user
    record(3)
    assert steps_in(file) == [2, 3]
    file.parent.rename(tmp_path / "moved")
    record(4)
    assert steps_in(tmp_path / "moved" / "metrics.jsonl") == [2, 3, 4] and not file.exists()
    shutil.rmtree(tmp_path / "moved")
    record(5)
    assert not list(tmp_path.iterdir())
