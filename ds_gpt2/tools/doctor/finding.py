"""A finding of the doctor, and the checks that return findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ds_gpt2.common.errors import one_line_reason

Status = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status  # fail: the run would stop or lose data; warn: it might; unknown: the check was not possible
    found: str  # the result, with figures
    fix: str = ""  # a command to type or a setting to change


@dataclass(frozen=True)
class Check:
    """One check and how to run it."""

    group: str  # heading under which the findings are printed
    name: str  # name of the finding if the check itself fails
    run: Callable[[], Finding | list[Finding]]
    quick: bool = False  # takes milliseconds and starts no program: ``train`` runs it too


def run_check(check: Check) -> list[Finding]:
    """Return the findings of ``check``; if it raises, a single finding with the status ``unknown``."""
    try:
        found = check.run()
    except Exception as error:  # one check that fails must not prevent the others
        return [Finding(check.name, "unknown", f"check not possible: {one_line_reason(error)}")]
    return [found] if isinstance(found, Finding) else found


def in_one_line(finding: Finding) -> str:
    """Return ``name: what was found; fix``."""
    return f"{finding.name}: {finding.found}" + (f"; {finding.fix}" if finding.fix else "")
