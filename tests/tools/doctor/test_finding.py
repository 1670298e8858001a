"""Findings, and checks that fail."""

from __future__ import annotations

from dataclasses import asdict

from ds_gpt2.tools.doctor.finding import Check, Finding, in_one_line, run_check


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


def test_findings_are_plain_values() -> None:
    assert asdict(Finding("free space", "ok", "1 GB free")) == {
        "name": "free space",
        "status": "ok",
        "found": "1 GB free",
        "fix": "",
    }
