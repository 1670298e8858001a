"""The outcome that ranks report reaches the process that started them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ds_gpt2.run_dir import exit_codes, exit_report
from ds_gpt2.run_dir.exit_report import ExitReports, Outcome

ROLLBACK = Outcome(exit_codes.ROLLBACK, before=7, leave_out=(3, 4))


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExitReports:
    reports = ExitReports(tmp_path / "gone" / "outcome")  # a directory that does not exist
    for name, value in reports.request().items():
        monkeypatch.setenv(name, value)
    return reports


def report_all() -> None:
    exit_report.report_failure(1, ValueError("first\nwith a line end"))
    exit_report.report_failure(0, RuntimeError("x" * 500))
    exit_report.report_outcome(ROLLBACK)


def test_exit_reports_arrive_without_a_disk(reports: ExitReports) -> None:
    assert reports.outcome() is None and reports.failures() == {}
    report_all()
    assert reports.outcome() == ROLLBACK
    assert next(iter(reports.failures().items())) == (1, "ValueError: first with a line end")
    assert len(reports.failures()[0]) == 160
    assert reports.outcome() == ROLLBACK  # also if it is read again


def test_a_file_is_used_if_there_is_no_pipe(
    reports: ExitReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.setenv("DS_GPT2_OUTCOME_PIPE", "/proc/self/fd/none 1 2")
    report_all()
    assert reports.outcome() == ROLLBACK and list(reports.failures()) == [1, 0]


def test_another_file_with_the_descriptor_of_the_pipe_is_not_written(
    reports: ExitReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "another").open("wb") as file:
        _, device, inode = reports.request()["DS_GPT2_OUTCOME_PIPE"].split()
        monkeypatch.setenv("DS_GPT2_OUTCOME_PIPE", f"/proc/{os.getpid()}/fd/{file.fileno()} {device} {inode}")
        report_all()
    assert (tmp_path / "another").read_bytes() == b"" and reports.outcome() is None


def test_without_a_reader_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_GPT2_OUTCOME", raising=False)
    monkeypatch.delenv("DS_GPT2_OUTCOME_PIPE", raising=False)
    report_all()


def test_the_keys_of_an_outcome_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor started before an update of the code must understand ranks started after it."""
    monkeypatch.delenv("DS_GPT2_OUTCOME_PIPE", raising=False)
    monkeypatch.setenv("DS_GPT2_OUTCOME", str(tmp_path / "outcome"))
    exit_report.report_outcome(Outcome(exit_codes.STOPPED, supervisor_lost=True))
    written = json.loads((tmp_path / "outcome").read_text())
    assert written == {"outcome": {"code": 3, "before": None, "leave_out": [], "alone": True}}
    assert ExitReports(tmp_path / "outcome").outcome() == Outcome(exit_codes.STOPPED, supervisor_lost=True)
