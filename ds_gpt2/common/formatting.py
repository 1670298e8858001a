"""Numbers and times as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

MISSING = "–"  # noqa: RUF001  # an en dash, where nothing is known


def duration(seconds: float) -> str:
    """``29`` as ``29s``, ``95`` as ``1m 35s``, ``86400`` as ``1d``, ``200000`` as ``2d 7h``."""
    whole = max(0, int(seconds))
    for long, in_long, short, in_short in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= in_long:
            rest = whole % in_long // in_short
            return f"{whole // in_long}{long}" + (f" {rest}{short}" if rest else "")
    return f"{whole}s"


def clock(time: float) -> str:
    """Seconds since 1970 in this machine's time zone, as ``Tue 25 Nov 18:20``."""
    return datetime.fromtimestamp(time).astimezone().strftime("%a %d %b %H:%M")


def zone(time: float) -> str:
    """This machine's time zone then, as ``UTC+0100``."""
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
    """``1`` as ``1 rank``, ``2000`` as ``2,000 ranks``.

    Args:
        plural: where it is not the noun and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def done_share(step: int, steps: int, digits: int = 1) -> str:
    """How far a run is, in percent, rounded down: 100% only when every step is done."""
    scale = 10**digits
    return f"{min(1.0, math.floor(100 * scale * step / steps) / (100 * scale)):.{digits}%}"


def size(count: int) -> str:
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def tokens(count: float) -> str:
    """``32_000_000_000`` as ``32.00 B``."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {letter}"
    return f"{count:,.0f}"


def uncapitalized(text: str) -> str:
    """``Input should be`` as ``input should be``; an acronym or a name such as ``GPT-2`` at its start stays."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].lower() + text[1:] if first[1:].islower() and first.isalpha() else text


def fixed(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f}%"
