"""Queues between supervisor, agents and ranks: a slow reader does not block the sender."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from ds_gpt2.supervision.cluster import channel
from ds_gpt2.supervision.cluster.channel import Outbox, OutputQueue, forward


def test_output_that_is_not_read_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_MAX_WAITING", 10)
    delivered: list[str] = []
    has_begun, reads = threading.Event(), threading.Event()

    def deliver(line: str) -> None:
        has_begun.set()
        assert reads.wait(30)
        delivered.append(line)

    lines: OutputQueue[str] = OutputQueue(deliver, lambda line: line)
    lines.put("first")
    assert has_begun.wait(30)
    for number in range(25):
        lines.put(f"line {number}")
    lines.put("a report", is_output=False)
    reads.set()
    lines.close(30)
    assert delivered[:11] == ["first", *(f"line {number}" for number in range(10))]
    assert delivered[11:] == ["a report", "15 lines of output were dropped: they were not read in time\n"]


@pytest.mark.parametrize("is_read", [True, False])
def test_an_outbox_is_closed_as_soon_as_everything_is_sent_or_fails(is_read: bool) -> None:
    read_end, write_end = os.pipe()
    if not is_read:
        os.close(read_end)
    outbox = Outbox(write_end)
    outbox.send({"id": 1, "value": 2})
    if not is_read:
        outbox.send({"output": "a line", "stream": 1})
    start_time = time.monotonic()
    outbox.close()
    assert time.monotonic() - start_time < 1
    assert not outbox._queue._thread.is_alive() and outbox._queue._items.empty()
    os.close(write_end)
    if is_read:
        assert os.read(read_end, 100) == b'{"id": 1, "value": 2}\n'
        os.close(read_end)


def test_a_line_without_an_end_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_MAX_LINE", 4)
    read_end, write_end = os.pipe()
    with forward(Outbox(write_end)) as (stdout, _):
        os.write(stdout, b"10%\r20%\r")
        with open(read_end, closefd=False) as file:
            sent = [json.loads(file.readline()) for _ in range(2)]
    assert sent == [{"output": "10%\r", "stream": 1}, {"output": "20%\r", "stream": 1}]
