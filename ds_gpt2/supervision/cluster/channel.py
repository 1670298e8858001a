"""The agent's side of the connection to its supervisor: requests come in, reports and output go out, without blocking.

The connection may stop moving at any time, as when a cable is pulled. Then neither the agent nor the ranks, whose
output passes through it, may wait.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.supervision.cluster.messages import encode

_MAX_WAITING = 10_000  # lines of output that wait to be sent; further ones are dropped
_CLOSE_SECONDS = 2.0


class Inbox:
    """Requests from a descriptor, read by a thread."""

    def __init__(self, descriptor: int) -> None:
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.has_ended = False
        threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def take(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Wait up to ``seconds`` for a request; yield those that have arrived."""
        with contextlib.suppress(queue.Empty):
            request = self._requests.get(timeout=seconds)
            while request is not None:
                yield request
                request = self._requests.get_nowait()
            self.has_ended = True

    def _read(self, descriptor: int) -> None:
        with contextlib.suppress(OSError), open(descriptor, "rb", closefd=False) as file:
            for line in file:
                if (request := safe_json.parse_object(line)) is not None:
                    self._requests.put(request)
        self._requests.put(None)


class Outbox:
    """Messages to a descriptor, written by a thread. After an error they are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send ``message``; output is dropped if too much waits."""
        if "output" not in message or self._lines.qsize() < _MAX_WAITING:
            self._lines.put(encode(message))

    def close(self) -> None:
        """Wait a moment until everything is sent."""
        self._lines.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (line := self._lines.get()) is not None:
                while line:
                    line = line[os.write(self._descriptor, line) :]
        while self._lines.get() is not None:
            pass


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
        for line in file:
            outbox.send({"output": line, "stream": stream})
