"""The journal of a run, and the time lost by interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from ds_gpt2.run_dir.journal import JOURNAL, Event, Journal, Kind, lost_times, read_journal


def _write_many(folder: Path, name: str) -> None:
    journal = Journal(folder)
    for number in range(200):
        journal.write("spike", name * 50, number)


def test_simultaneous_events_of_two_processes_are_all_written(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = list(read_journal(tmp_path))
    assert sorted((event.text[0], event.step) for event in events) == sorted((n, s) for n in "ab" for s in range(200))


def test_a_line_cut_by_a_crash_is_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("save", "saved", 5, taken=1.0)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"time": 1, "kind"\n')
        file.write(b"[1, 2]\n")
    before = journal.size()
    journal.write("crash", "rank 1: gone", 7)
    assert [(event.kind, event.step, event.facts) for event in read_journal(tmp_path)] == [
        ("save", 5, {"taken": 1.0}),
        ("crash", 7, {}),
    ]
    assert [event.kind for event in read_journal(tmp_path, before)] == ["crash"]
    assert {"time", "step", "kind", "text"} <= set(json.loads((tmp_path / JOURNAL).read_bytes().splitlines()[0]))


@pytest.mark.skipif(os.geteuid() != 0, reason="checks what happens where even root cannot write")
def test_an_unwritable_journal_raises_no_error(log_messages: list[str]) -> None:
    Journal(Path("/proc")).write("crash", "rank 1: gone")
    assert any("rank 1: gone" in message for message in log_messages)


def test_an_event_that_cannot_be_written_is_returned_and_written_later(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).mkdir()  # simulates a disk that is not writable
    journal = Journal(tmp_path)
    missed = journal.write("crash", "rank 1: gone", 7, rank=1)
    assert missed is not None and (missed.kind, missed.step, missed.facts) == ("crash", 7, {"rank": 1})
    assert journal.write("launch", "starting") is not None
    (tmp_path / JOURNAL).rmdir()
    assert journal.write("start", "started", 5) is None
    events = list(read_journal(tmp_path))
    assert [event.kind for event in events] == ["crash", "launch", "start"] and events[0] == missed


def _events(*events: tuple[float, Kind, int | None]) -> list[Event]:
    return [Event(time, kind, "", step) for time, kind, step in events]


def test_the_time_lost_by_a_crash_is_from_the_resumed_state_to_the_next_start() -> None:
    events = _events((0, "start", 0), (100, "save", 10), (150, "crash", 15), (170, "start", 10), (300, "done", 30))
    assert [(lost.start, lost.end, lost.cause) for lost in lost_times(events)] == [(100, 170, "crash")]


def test_a_state_counts_as_reached_when_it_was_copied_not_when_it_was_saved() -> None:
    events = _events((0, "start", 0), (150, "crash", 15), (170, "start", 10))
    events.insert(1, Event(109, "save", "", 10, {"taken": 100}))
    assert [lost.seconds for lost in lost_times(events)] == [70]


def test_a_crash_before_the_first_save_loses_all_time() -> None:
    events = _events((10, "start", 0), (50, "hang", 9), (60, "start", 0), (80, "save", 5), (90, "stop", 5))
    assert [lost.seconds for lost in lost_times(events)] == [50]


def test_a_crash_of_a_fork_before_its_first_save_loses_all_its_time() -> None:
    events = _events((10, "start", 8), (50, "crash", 9), (60, "start", 8), (80, "save", 12))
    assert [lost.seconds for lost in lost_times(events)] == [50]


def test_a_later_start_from_an_earlier_state_counts_time_only_once() -> None:
    events = _events(
        (0, "start", 0), (100, "save", 10), (200, "save", 20), (250, "crash", 25), (260, "start", 20),
        (290, "crash", 25), (300, "start", 10), (400, "save", 20),
    )  # fmt: skip
    assert [(lost.start, lost.end) for lost in lost_times(events)] == [(100, 300)]


def test_the_time_between_a_stop_and_a_start_is_lost() -> None:
    events = _events((0, "start", 0), (100, "save", 10), (101, "stop", 10), (500, "start", 10))
    assert [(lost.seconds, lost.cause) for lost in lost_times(events)] == [(400, "stop")]
