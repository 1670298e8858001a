"""What a look at the machine comes to: a row. And how one is taken, so that a look that fails is a row as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    name: str
    status: Status  # fail: the run would end or lose something; warn: it may; unknown: it could not be looked at
    found: str  # with figures
    fix: str = ""  # what to type or to change


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    group: str  # under which its rows are shown
    name: str  # of its row, should the look itself fail
    look: Callable[[], Finding | list[Finding]]
    quick: bool = False  # takes milliseconds: ``train`` does it too


def examine(check: Check) -> list[Finding]:
    """The rows of ``check``; one that says ``unknown`` where it breaks, whatever the reason."""
    try:
        found = check.look()
    except Exception as error:  # a machine has many ways to refuse an answer, and none of them may hide the others
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Finding(check.name, "unknown", f"could not be looked at: {reason}")]
    return [found] if isinstance(found, Finding) else found


def in_one_line(row: Finding) -> str:
    """``name: what was found; fix``."""
    return f"{row.name}: {row.found}" + (f"; {row.fix}" if row.fix else "")
