"""Format numbers, times and tables for users."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

DAY, HOUR = 86_400, 3600  # seconds
MISSING = "–"  # noqa: RUF001  # an en dash, for unknown values


def duration(seconds: float) -> str:
    """Format a duration: ``29s``, ``1m 35s``, ``1d``, ``2d 7h``. Fractions of a second are dropped."""
    whole = max(0, int(seconds))
    for long, in_long, short, in_short in (("d", DAY, "h", HOUR), ("h", HOUR, "m", 60), ("m", 60, "s", 1)):
        if whole >= in_long:
            rest = whole % in_long // in_short
            return f"{whole // in_long}{long}" + (f" {rest}{short}" if rest else "")
    return f"{whole}s"


def clock(time: float) -> str:
    """Format seconds since 1970 in the local time zone, as ``Tue 25 Nov 18:20``."""
    return datetime.fromtimestamp(time).astimezone().strftime("%a %d %b %H:%M")


def zone(time: float) -> str:
    """Return the local time zone at ``time``, in seconds since 1970, as ``UTC+0100``."""
    return datetime.fromtimestamp(time).astimezone().strftime("UTC%z")


def table(lines: Sequence[Sequence[str]], indent: str = "", last_left: bool = False) -> str:
    """Return lines of cells as a table: the first column aligned to the left, the others to the right.

    Args:
        last_left: align the last column to the left, for text.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = slice(1, -1 if last_left else None)

    def row(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[right], widths[right])]
        return (indent + "  ".join([*cells, *([line[-1]] if last_left else [])])).rstrip()

    return "\n".join(map(row, lines))


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: ``1 rank``, ``2,000 ranks``.

    Args:
        plural: the plural of the noun, if it is not formed with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def done_share(step: int, steps: int, digits: int = 1) -> str:
    """Format the progress of a run in percent, rounded down: 100% only when all steps are done."""
    scale = 10**digits
    return f"{min(1.0, math.floor(100 * scale * step / steps) / (100 * scale)):.{digits}%}"


def size(count: int) -> str:
    """Format a number of bytes in decimal units: ``1.5 MB``, ``12.34 GB``, ``1.20 TB``."""
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def tokens(count: float) -> str:
    """Format a number of tokens: ``32_000_000_000`` as ``32.00 B``."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {letter}"
    return f"{count:,.0f}"


def truncated(text: str, length: int) -> str:
    """Return ``text`` if it has at most ``length`` characters, else its beginning with ``...``, ``length`` in total."""
    return text if len(text) <= length else text[: length - 3] + "..."


def uncapitalized(text: str) -> str:
    """Return ``text`` with a lower-case first letter, unless it starts with an acronym or a name such as ``GPT-2``."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].lower() + text[1:] if first[1:].islower() and first.isalpha() else text


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimal places; ``MISSING`` for None."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def signed(difference: float, digits: int = 4) -> str:
    """Format a difference with its sign; what rounds to zero, such as the rounding error of a float, is ``+0``."""
    return f"{round(difference, digits) + 0.0:+,.{digits}f}"  # -0.0 + 0.0 is 0.0


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share between 0 and 1 in percent; ``MISSING`` for None."""
    return MISSING if share is None else f"{100 * share:.{digits}f}%"
