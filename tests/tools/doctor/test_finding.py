"""Findings, and checks that fail."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.tools.doctor.finding import Check, Finding, failure, in_one_line, run_check


def test_a_failing_check_becomes_a_finding_and_the_others_run() -> None:
    def broken() -> Finding:
        raise PermissionError(13, "Permission denied", "/dev/kmsg")

    listed = [Check("machine", "kernel log", broken), Check("machine", "time", lambda: Finding("time", "ok", "noon"))]
    rows = [row for check in listed for row in run_check(check)]
    assert [(row.name, row.status) for row in rows] == [("kernel log", "unknown"), ("time", "ok")]
    assert rows[0].found == "check not possible: [Errno 13] Permission denied: '/dev/kmsg'"
    assert (
        in_one_line(Finding("free space", "fail", "1 GB free", "delete files")) == "free space: 1 GB free; delete files"
    )
    assert in_one_line(rows[1]) == "time: noon"
    assert in_one_line(Finding("this run", "fail", "k is supervised", "wait")) == "k is supervised; wait"


@pytest.mark.parametrize(
    ("message", "found", "fix"),
    [
        ("no data: /x is empty: run `./launch.sh prepare`", "no data: /x is empty", "run `./launch.sh prepare`"),
        ("/x is broken; restore it, or set y: z", "/x is broken", "restore it, or set y: z"),
        ("/x is missing; `./launch.sh list` shows more", "/x is missing", "`./launch.sh list` shows more"),
        ("/x: settings are wrong", "/x: settings are wrong", ""),
    ],
)
def test_the_fix_in_the_message_of_an_error_is_separate(message: str, found: str, fix: str) -> None:
    assert failure("data", UserError(message)) == Finding("data", "fail", found, fix)


def test_findings_are_plain_values() -> None:
    assert asdict(Finding("free space", "ok", "1 GB free")) == {
        "name": "free space",
        "status": "ok",
        "found": "1 GB free",
        "fix": "",
    }
