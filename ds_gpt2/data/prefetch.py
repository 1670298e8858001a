"""Prefetch: compute the next value in a thread while the current one is in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")

_DELAY_SECONDS = 0.001  # lets the caller continue first, which would otherwise wait for the GIL


class Prefetcher(Generic[Value]):
    """Computes ``make(number)`` in a thread, one number ahead of the last one requested."""

    def __init__(self, make: Callable[[int], Value]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._upcoming: tuple[int, Future[Value]] | None = None

    def get(self, number: int) -> Value:
        """Return ``make(number)``, or raise what it raises, and start ``make(number + 1)``."""
        if self._upcoming is None or self._upcoming[0] != number:
            self._start(number)
        assert self._upcoming is not None
        value = self._upcoming[1].result()
        self._start(number + 1, _DELAY_SECONDS)
        return value

    def _start(self, number: int, delay_seconds: float = 0.0) -> None:
        self._upcoming = number, self._thread.submit(self._make_after, number, delay_seconds)

    def _make_after(self, number: int, delay_seconds: float) -> Value:
        time.sleep(delay_seconds)
        return self._make(number)
