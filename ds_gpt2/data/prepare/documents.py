"""What every reader of text returns: documents, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLUMN = "text"  # the default field or column that holds a document
BLOCK_CHARACTERS = 1 << 20  # longer documents are passed on in blocks of about this size


@dataclass(frozen=True)
class Unreadable:
    """A document that is damaged. It is reported, counted and skipped."""

    reason: str  # one line, with the file and the line number


Document = str | Iterable[str] | Unreadable | None  # whole; in blocks, if long; damaged; null
