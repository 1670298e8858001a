"""The documents that every reader of text yields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLUMN = "text"  # the default field or column that holds a document
BLOCK_CHARACTERS = 1 << 20  # approximate size of the blocks of a longer document


@dataclass(frozen=True)
class Unreadable:
    """A damaged document. It is reported, counted and skipped."""

    reason: str  # one line, with the file and the line number


Document = str | Iterable[str] | Unreadable | None  # whole; in blocks if long; damaged; null
