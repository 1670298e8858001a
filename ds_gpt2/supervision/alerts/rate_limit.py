"""How many messages go out. What is held back is counted, and told with the next one.

The count is kept in a file: a supervisor that starts again goes on with it, and the check that cron makes shares it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import no_links, regular_only, write_all
from ds_gpt2.supervision.alerts.message import ENDINGS, held_back

_HOUR = 3600.0
_FOR_ENDINGS = 4  # messages an hour beyond the limit


@dataclass
class _Count:
    sent: list[float] = field(default_factory=list)  # seconds since 1970, of the last hour
    held: dict[str, int] = field(default_factory=dict)  # events by kind
    held_since: float = 0.0


class HourlyLimit:
    """At most so many messages in any hour, and a few more about a run's end."""

    def __init__(self, file: Path, per_hour: int) -> None:
        self._file = file
        self._per_hour = per_hour
        self._count = _Count()
        self._written = True  # what is in the file is as new as what is here
        with contextlib.suppress(OSError), open(file, "rb", opener=regular_only) as left:
            self._count = _read(left)

    def admit(self, kinds: Sequence[str], now: float) -> str | None:
        """Count a message about events of ``kinds``.

        Returns:
            None if it has to be held back; else what it has to say of those held back before, which may be nothing.
        """
        with self._shared() as count:
            count.sent = [time for time in count.sent if now - _HOUR < time <= now]
            most = self._per_hour + (_FOR_ENDINGS if ENDINGS & set(kinds) else 0)
            if len(count.sent) >= most:
                count.held_since = count.held_since if count.held else now
                count.held = dict(Counter(count.held) + Counter(kinds))
                return None
            count.sent.append(now)
            said = held_back(Counter(count.held).elements(), count.held_since) if count.held else ""
            count.held = {}
            return said

    def holds_and_has_room(self, now: float) -> bool:
        """Whether events are held back that could be told now. Reads no file."""
        recent = [time for time in self._count.sent if now - _HOUR < time <= now]
        return bool(self._count.held) and len(recent) < self._per_hour

    @contextlib.contextmanager
    def _shared(self) -> Iterator[_Count]:
        """The count as the file has it, put back after the change. Where the disk fails, memory has to do."""
        with contextlib.ExitStack() as stack:
            file: BinaryIO | None = None
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(self._file, "a+b", buffering=0, opener=no_links))
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._written:
                    self._count = _read(file)
            yield self._count
            self._written = file is not None and _write(file, self._count)


def _read(file: BinaryIO) -> _Count:
    """Nothing has been counted where the file is new, or damaged."""
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
    try:
        file.truncate(0)
        write_all(file.write, json.dumps(asdict(count)).encode())
    except OSError:
        return False
    return True
