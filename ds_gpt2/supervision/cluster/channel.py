"""Queues between the processes of a run on several machines: a slow reader does not block the sender.

A connection may stop moving at any time, as when a cable is pulled, and a terminal may stop reading. Then neither the
supervisor, nor the agents, nor the ranks, whose output passes through both, may wait.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ds_gpt2.supervision.cluster.messages import encode

_MAX_WAITING = 10_000  # lines of output that wait; further ones are dropped
_MAX_LINE = 1 << 16  # characters; a longer line of output, such as that of a progress bar, is sent in parts
_CLOSE_SECONDS = 2.0

T = TypeVar("T")


class OutputQueue(Generic[T]):
    """Delivers items by a thread, in their order. If too many wait, output is dropped, and a line says how much."""

    def __init__(self, deliver: Callable[[T], None], as_item: Callable[[str], T]) -> None:
        """
        Args:
            deliver: called in the thread; it must not raise.
            as_item: returns a line of output as an item.
        """
        self._deliver = deliver
        self._as_item = as_item
        self._items: queue.Queue[T | None] = queue.Queue()
        self._dropped = 0  # lines of output that are not reported yet
        self._lock = threading.Lock()  # of ``_dropped``
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, item: T, is_output: bool = True) -> None:
        """Add an item; only output may be dropped."""
        if is_output and self._items.qsize() >= _MAX_WAITING:
            with self._lock:
                self._dropped += 1
        else:
            self._items.put(item)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait until everything is delivered, at most ``seconds``; nothing may be added any more."""
        self._items.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        item: T | None
        while (item := self._items.get()) is not None:
            self._deliver(item)
            if self._items.empty():
                self._report_dropped()
        self._report_dropped()

    def _report_dropped(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._deliver(self._as_item(f"{dropped:,} lines of output were dropped: they were not read in time\n"))


class Outbox:
    """Messages of an agent to a descriptor. After an error they are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._queue = OutputQueue(self._write, lambda line: encode({"output": line, "stream": 2}))

    def send(self, message: Mapping[str, Any]) -> None:
        """Send ``message``; output is dropped if too much waits."""
        self._queue.put(encode(message), "output" in message)

    def close(self) -> None:
        """Wait a moment until everything is sent."""
        self._queue.close()

    def _write(self, line: bytes) -> None:
        try:
            while line and self._descriptor is not None:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            self._descriptor = None


@contextlib.contextmanager
def forward(outbox: Outbox) -> Iterator[tuple[int, int]]:
    """Yield descriptors for the standard output and standard error of a process; threads send what it writes.

    The descriptors are closed at the end of the context: then only the process and its children have them.
    """
    ends = [os.pipe() for _ in range(2)]
    for stream, (read_end, _) in enumerate(ends, 1):
        threading.Thread(target=_send_lines, args=(outbox, read_end, stream), daemon=True).start()
    try:
        yield ends[0][1], ends[1][1]
    finally:
        for _, write_end in ends:
            os.close(write_end)


def _send_lines(outbox: Outbox, descriptor: int, stream: int) -> None:
    with open(descriptor, encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        while line := file.readline(_MAX_LINE):
            outbox.send({"output": line, "stream": stream})
