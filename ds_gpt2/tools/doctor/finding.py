"""A finding of the doctor, and the checks that return findings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ds_gpt2.common.errors import UserError, one_line_reason

Status = Literal["ok", "warn", "fail", "unknown"]

# Where the fix begins in the message of a UserError: a separator, then an imperative or a command.
_FIX = re.compile(
    r"[:;] (?=(?:add|choose|create|give|increase|install|mount|move|prepare|remove|restore|run|set|use|write)\b"
    r"|`\./launch)"
)
_SENTENCES = ("this run", "other runs")  # what these checks have found is a whole sentence, without their name


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status  # fail: the run would stop or lose data; warn: it might; unknown: the check was not possible
    found: str  # the result, with figures
    fix: str = ""  # a command to type or a setting to change


@dataclass(frozen=True)
class Row:
    """A finding, and the heading under which it is printed."""

    group: str
    finding: Finding
    host: str | None = None  # one of several hosts; None: this machine, or all hosts


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


def failure(name: str, error: UserError) -> Finding:
    """Return the finding of a check that failed with ``error``, whose message may contain the fix."""
    found, *fix = _FIX.split(str(error), maxsplit=1)
    return Finding(name, "fail", found, *fix)


def in_one_line(finding: Finding) -> str:
    """Return ``name: what was found; fix``."""
    name = "" if finding.name in _SENTENCES else f"{finding.name}: "
    return f"{name}{finding.found}" + (f"; {finding.fix}" if finding.fix else "")
