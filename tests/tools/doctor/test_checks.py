"""The list of checks: backup, missing data, and the quick checks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctor_helpers import changed
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from launched import PROJECT

from ds_gpt2.config.settings import Settings
from ds_gpt2.tools.doctor import checks as checks_module
from ds_gpt2.tools.doctor.checks import checks, quick
from ds_gpt2.tools.doctor.finding import Finding, run_check


def backup_row(settings: Settings, to: str) -> Finding:
    backup = settings.checkpoint.backup.model_copy(update={"to": to})
    with_backup = changed(settings, checkpoint={"backup": backup})
    (check,) = [check for check in checks(with_backup, "cpu", 1) if check.name == "backup"]
    (row,) = run_check(check)
    return row


def test_a_backup_is_probed_with_a_small_file(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})  # other tests of this process may have left files
    row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("ok", "memory://nas/test: a file was written, read back and deleted")
    assert MemoryFileSystem.store == {}

    def refuse(self: object, data: bytes) -> int:
        raise PermissionError("403 for sesame-sesame")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-sesame")
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "write", refuse)
        row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("fail", "memory://nas/test: 403 for ***")
    assert "check that the directory or bucket exists" in row.fix
    assert MemoryFileSystem.store == {}


def test_a_backup_that_does_not_answer_times_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_gpt2.tools.doctor.checks._BACKUP_SECONDS", 0.2)
    monkeypatch.setattr(MemoryFile, "write", lambda self, data: time.sleep(3))
    start_time = time.monotonic()
    row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("fail", "memory://nas/test: no answer within 0.2 s")
    assert time.monotonic() - start_time < 2


def test_missing_metrics_of_a_saved_run_are_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = [row for row in quick(settings, "cpu", 1) if row.name == "metrics"]
    assert (row.status, row.found) == ("ok", "no step is recorded yet")
    monkeypatch.setattr("ds_gpt2.tools.doctor.run_files.newest_step", lambda directory: 35)
    (row,) = [row for row in quick(settings, "cpu", 1) if row.name == "metrics"]
    found = f"{settings.run_dir / 'metrics.jsonl'} is missing: the losses up to step 35 are unknown"
    assert (row.status, row.found, row.fix) == ("warn", found, "restore it from a copy of the run")
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "metrics.jsonl").write_text('{"step": 35}\n')
    (row,) = [row for row in quick(settings, "cpu", 1) if row.name == "metrics"]
    assert (row.status, row.found) == ("ok", "recorded up to step 35")


def test_one_of_several_hosts_counts_the_ranks_of_all(settings: Settings) -> None:
    (batch,) = (row for check in checks(settings, "cpu", 2, 8) if check.name == "batch" for row in run_check(check))
    assert batch.found.endswith("x 8 ranks")


def test_missing_data_is_one_finding(settings: Settings, tmp_path: Path) -> None:
    without_data = changed(settings, data={"dir": tmp_path / "missing"})
    rows = [row for check in checks(without_data, "cpu", 2) if check.group == "data" for row in run_check(check)]
    assert [(row.name, row.status) for row in rows] == [("data", "fail"), ("HellaSwag", "ok")]
    assert f"prepare text FILE... --out {tmp_path}" in rows[0].fix and "prepare" not in rows[0].found


def test_quick_checks_are_fast_and_do_not_import_torch(settings: Settings, tmp_path: Path) -> None:
    names = {row.name for row in quick(settings, "cpu", 4)}
    assert names >= {
        "free space",
        "directories",
        "open files",
        "shared memory",
        "memory",
        "time limit",
        "this run",
        "loopback",
    }
    assert not names & {"checksums", "ranks", "write speed", "versions", "clock"}
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ds_gpt2.config.settings import load_settings\n"
        "from ds_gpt2.tools.doctor.checks import quick\n"
        f"settings = load_settings(Path({str(tmp_path / 'run.yaml')!r}))\nstart = time.process_time()\n"
        "quick(settings, 'cpu', 4), quick(settings, 'cuda', 4)\n"
        "print(time.process_time() - start, {'torch', 'deepspeed'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    seconds, modules = result.stdout.split(maxsplit=1)
    assert float(seconds) < 1.0
    assert modules == "set()\n"


@pytest.mark.parametrize("end", [None, "1800000000"])
def test_quick_checks_start_no_program(settings: Settings, monkeypatch: pytest.MonkeyPatch, end: str | None) -> None:
    def refuse(*command: object, **options: object) -> None:
        raise AssertionError(f"started: {command}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if end is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    rows = {row.name: row for row in quick(settings, "cpu", 1)}
    assert ("time limit" in rows) == (end is not None)
    assert not [row for row in rows.values() if "started: " in row.found]


def test_a_clock_behind_a_file_in_any_folder_of_the_project_is_found(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds_gpt2" / "tools" / "doctor" / "new.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(checks_module, "PROJECT_DIR", tmp_path)
    assert checks_module._time(settings).status == "ok"
    os.utime(file, (time.time() + 7200,) * 2)
    finding = checks_module._time(settings)
    assert finding.status != "ok" and str(file) in finding.found
