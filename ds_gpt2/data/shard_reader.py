"""Read ranges of tokens for training; retry after errors of the disk, and never return wrong tokens.

No memory map is used: an I/O error in one is a SIGBUS, which ends the process without an error message.
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

_PAUSES = (0.5, 1, 2, 4, 8, 16, 32, 64)  # seconds, two minutes in total, less than a silent rank is allowed
_POLL_SECONDS = 0.2  # between two checks for a stop
MAX_OPEN_FILES = 200  # of one reader; a common limit of a process is 1,024


@dataclass(frozen=True)
class _OpenShard:
    file: int  # descriptor
    start: int  # byte offset of the first token
    stamp: tuple[int, int]  # size in bytes, modification time in ns


class ShardReader:
    """Reads token ranges of several shards, which must not change meanwhile."""

    def __init__(
        self,
        paths: Sequence[Path],
        warn: Callable[[str], None] = log.warning,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            warn: called with one line for each failed read.
            stopped: called before a read is retried; True ends the retries.
        """
        self._paths = paths
        self._directories = {path.parent: OpenDirectory(path.parent) for path in paths}  # valid even if moved
        self._warn, self._stopped = warn, stopped
        self._opened: dict[int, _OpenShard] = {}

    def read(self, number: int, first: int, into: Tokens) -> None:
        """Fill ``into`` (n,) uint16 with the tokens of shard ``number`` from its token ``first`` on.

        Raises:
            UserError: the shard was changed, or could not be read for two minutes or until ``stopped``.
        """
        for pause in (*_PAUSES, None):
            try:
                return self._read(number, first, into)
            except OSError as error:
                self._close(number)
                problem = f"shard {self._paths[number]} cannot be read: {error.strerror or error}"
                if pause is None:
                    raise UserError(f"{problem}; retried for {sum(_PAUSES):.0f} s") from None
                self._warn(f"{problem}; retrying in {pause:g} s")
                if not self._wait(pause):
                    raise UserError(f"{problem}; not retried because a stop was requested") from None
        raise AssertionError("the last pause raises")

    def _wait(self, seconds: float) -> bool:
        """Wait; return False as soon as a stop is requested."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopped():
                return False
            time.sleep(min(_POLL_SECONDS, left))
        return True

    def _read(self, number: int, first: int, into: Tokens) -> None:
        opened = self._opened.get(number) or self._open(number)
        if _stamp(opened.file) != opened.stamp:
            raise UserError(f"shard {self._paths[number]} was changed during training: restore it and resume")
        left = into.data.cast("B")
        position = opened.start + TOKEN_BYTES * first
        while left:
            count = os.preadv(opened.file, [left], position)
            if not count:
                raise UserError(f"shard {self._paths[number]} is truncated at byte {position}: restore it and resume")
            left, position = left[count:], position + count

    def _open(self, number: int) -> _OpenShard:
        while len(self._opened) >= MAX_OPEN_FILES:
            self._close(next(iter(self._opened)))
        path = self._paths[number]
        path = self._directories[path.parent].path / path.name
        start = start_of(path)
        file = regular_only(str(path), os.O_RDONLY)
        self._opened[number] = opened = _OpenShard(file, start, _stamp(file))
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
