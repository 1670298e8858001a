"""Limit the number of messages per hour. Events over the limit are counted; the next message has the count.

The count is in a file, so that it survives a restart of the supervisor, and so that the supervisor and
``status --alert``, which cron starts, share it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import no_links, regular_only, write_all
from ds_gpt2.common.formatting import HOUR
from ds_gpt2.common.locks import wait_for_lock
from ds_gpt2.supervision.alerts.message import FINAL_KINDS, count_more

_EXTRA_FOR_FINAL_KINDS = 4  # messages per hour over the limit


@dataclass
class _Count:
    """The content of the file."""

    sent: list[float] = field(default_factory=list)  # seconds since 1970, of the last hour
    held: dict[str, int] = field(default_factory=dict)  # withheld events by kind
    held_since: float = 0.0


class HourlyLimit:
    """At most ``per_hour`` messages in any hour, and a few more about the end of a run."""

    def __init__(self, file: Path, per_hour: int) -> None:
        self._file = file
        self._per_hour = per_hour
        self._count = _Count()
        self._is_stored = True  # the file has the newest count
        with contextlib.suppress(OSError), open(file, "rb", opener=regular_only) as existing:
            self._count = _read(existing)

    def admit(self, kinds: Sequence[str], now: float) -> str | None:
        """Count a message about events of ``kinds``.

        Args:
            now: seconds since 1970.

        Returns:
            None if the message must not be sent; else a summary of the events withheld before, empty if there are none.
        """
        with self._stored_count() as count:
            count.sent = [time for time in count.sent if now - HOUR < time <= now]
            limit = self._per_hour + (_EXTRA_FOR_FINAL_KINDS if FINAL_KINDS & set(kinds) else 0)
            if len(count.sent) >= limit:
                count.held_since = count.held_since if count.held else now
                count.held = dict(Counter(count.held) + Counter(kinds))
                return None
            count.sent.append(now)
            summary = count_more(Counter(count.held).elements(), count.held_since) if count.held else ""
            count.held = {}
            return summary

    def can_send_withheld(self, now: float) -> bool:
        """Return whether events are withheld that may be sent now. Reads no file."""
        recent = [time for time in self._count.sent if now - HOUR < time <= now]
        return bool(self._count.held) and len(recent) < self._per_hour

    @contextlib.contextmanager
    def _stored_count(self) -> Iterator[_Count]:
        """Read the count from the file and write it back after a change; use memory only if the file fails."""
        with contextlib.ExitStack() as stack:
            file: BinaryIO | None = None
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(self._file, "a+b", buffering=0, opener=no_links))
                wait_for_lock(file)
                if self._is_stored:
                    self._count = _read(file)
            yield self._count
            self._is_stored = file is not None and _write(file, self._count)


def _read(file: BinaryIO) -> _Count:
    """Return the count in ``file``; zero if the file is new or damaged."""
    file.seek(0)
    try:
        values = safe_json.parse(file.read())
        return _Count(
            sorted(float(time) for time in values["sent"]),
            {str(kind): int(number) for kind, number in values["held"].items()},
            float(values["held_since"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return _Count()


def _write(file: BinaryIO, count: _Count) -> bool:
    """Replace the content of ``file``; return whether that succeeded."""
    try:
        file.truncate(0)
        write_all(file.write, json.dumps(asdict(count)).encode())
    except OSError:
        return False
    return True
