"""What comes next is made while what is there is in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")

_LATER_SECONDS = 0.001  # the one that has asked goes on first: it would wait for Python's lock


class Ahead(Generic[Made]):
    """The values of a function of whole numbers that are asked for one after the other, each made in a thread."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._upcoming: tuple[int, Future[Made]] | None = None

    def take(self, number: int) -> Made:
        """``make(number)``, and what that raises; ``make(number + 1)`` is begun."""
        if self._upcoming is None or self._upcoming[0] != number:
            self._begin(number)
        assert self._upcoming is not None
        made = self._upcoming[1].result()
        self._begin(number + 1, _LATER_SECONDS)
        return made

    def _begin(self, number: int, after_seconds: float = 0.0) -> None:
        self._upcoming = number, self._thread.submit(self._make_after, number, after_seconds)

    def _make_after(self, number: int, seconds: float) -> Made:
        time.sleep(seconds)
        return self._make(number)
