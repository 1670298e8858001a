"""Stretches of shards, as training reads them: what goes wrong is said, tried again, and never becomes other tokens.

Not through a memory map: an error of the disk would be a signal, SIGBUS, which ends the process without a message.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.data.shards import TOKEN_BYTES, Tokens, start_of

log = logging.getLogger(__name__)

_PAUSES = (0.5, 1, 2, 4, 8, 16, 32, 64)  # seconds, two minutes together: a rank that hangs is given longer
_LOOK_SECONDS = 0.2  # between two looks for a stop
_MOST_OPEN = 200  # files; a process may have 1,024 on many a machine


@dataclass(frozen=True)
class _Opened:
    file: int
    start: int  # byte of the first token
    stamp: tuple[int, int]


class ShardReader:
    """Reads from any of some shards, which stay as they are."""

    def __init__(
        self,
        paths: Sequence[Path],
        tell: Callable[[str], None] = log.warning,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            tell: is given what goes wrong, one line each.
            stopped: asked while a read is waiting to be tried again; True ends the waiting.
        """
        self._paths = paths
        self._directories = {path.parent: OpenDirectory(path.parent) for path in paths}  # moved along with a project
        self._tell, self._stopped = tell, stopped
        self._opened: dict[int, _Opened] = {}

    def read(self, number: int, first: int, into: Tokens) -> None:
        """Fill ``into`` with the tokens of shard ``number`` from its token ``first`` on.

        Raises:
            UserError: the shard is not what it was, or could not be read for two minutes or until ``stopped``.
        """
        for pause in (*_PAUSES, None):
            try:
                return self._read(number, first, into)
            except OSError as error:
                self._close(number)
                said = f"shard {self._paths[number]} cannot be read: {error.strerror or error}"
                if pause is None:
                    raise UserError(f"{said}; tried for {sum(_PAUSES):.0f} seconds") from None
                self._tell(f"{said}; again in {pause:g} s")
                if not self._wait(pause):
                    raise UserError(f"{said}, and the run is to stop") from None
        raise AssertionError("the last pause raises")

    def _wait(self, seconds: float) -> bool:
        """Whether no stop came meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopped():
                return False
            time.sleep(min(_LOOK_SECONDS, left))
        return True

    def _read(self, number: int, first: int, into: Tokens) -> None:
        opened = self._opened.get(number) or self._open(number)
        if _stamp(opened.file) != opened.stamp:
            raise UserError(f"shard {self._paths[number]} was changed while it is trained on: restore it and go on")
        left = into.data.cast("B")
        place = opened.start + TOKEN_BYTES * first
        while left:
            count = os.preadv(opened.file, [left], place)
            if not count:
                raise UserError(f"shard {self._paths[number]} ends at byte {place}, too early: restore it and go on")
            left, place = left[count:], place + count

    def _open(self, number: int) -> _Opened:
        while len(self._opened) >= _MOST_OPEN:
            self._close(next(iter(self._opened)))
        path = self._paths[number]
        path = self._directories[path.parent].path / path.name
        start = start_of(path)
        file = regular_only(str(path), os.O_RDONLY)
        self._opened[number] = opened = _Opened(file, start, _stamp(file))
        return opened

    def _close(self, number: int) -> None:
        if (opened := self._opened.pop(number, None)) is not None:
            os.close(opened.file)

    def __del__(self) -> None:
        for number in list(self._opened):
            self._close(number)


def _stamp(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns
