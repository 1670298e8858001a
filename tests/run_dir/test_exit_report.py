"""The outcome that ranks report reaches the process that started them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.exit_report import ExitReports, Outcome

ROLLBACK = Outcome(exit_report.ROLLBACK, before=7, leave_out=(3, 4))


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExitReports:
    words = ExitReports(tmp_path / "gone" / "outcome")  # a directory that is not there
    for name, value in words.request().items():
        monkeypatch.setenv(name, value)
    return words


def leave_all() -> None:
    exit_report.report_failure(1, ValueError("first\nwith a line end"))
    exit_report.report_failure(0, RuntimeError("x" * 500))
    exit_report.report_outcome(ROLLBACK)


def test_they_arrive_without_a_disk(words: ExitReports) -> None:
    assert words.outcome() is None and words.failures() == {}
    leave_all()
    assert words.outcome() == ROLLBACK
    assert next(iter(words.failures().items())) == (1, "ValueError: first with a line end")
    assert len(words.failures()[0]) == 160
    assert words.outcome() == ROLLBACK  # as often as it is asked for


def test_a_file_does_where_there_is_no_pipe(
    words: ExitReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.setenv("DS_GPT2_OUTCOME_PIPE", "/proc/self/fd/none 1 2")
    leave_all()
    assert words.outcome() == ROLLBACK and list(words.failures()) == [1, 0]


def test_what_has_the_number_of_the_pipe_now_is_not_written_to(
    words: ExitReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "another").open("wb") as file:
        _, device, inode = words.request()["DS_GPT2_OUTCOME_PIPE"].split()
        monkeypatch.setenv("DS_GPT2_OUTCOME_PIPE", f"/proc/{os.getpid()}/fd/{file.fileno()} {device} {inode}")
        leave_all()
    assert (tmp_path / "another").read_bytes() == b"" and words.outcome() is None


def test_nothing_is_left_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_GPT2_OUTCOME", raising=False)
    monkeypatch.delenv("DS_GPT2_OUTCOME_PIPE", raising=False)
    leave_all()
