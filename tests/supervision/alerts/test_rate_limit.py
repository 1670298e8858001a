"""The hourly limit of messages."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from alert_service import command_messages, settings_with_command

from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts import alerts as alerts_module
from ds_gpt2.supervision.alerts.alerts import COUNT, Alerts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time at which messages are counted."""
    now = [time.time()]
    monkeypatch.setattr(alerts_module, "time", SimpleNamespace(time=lambda: now[0]))
    return now


def test_events_over_the_limit_are_summarized_also_if_no_event_follows(run_dir: Path, clock: list[float]) -> None:
    journal = Journal(run_dir)
    for _ in range(4):  # a new process continues the count
        alerts = Alerts(settings_with_command(run_dir), run_dir)
        for step in range(50):
            journal.write("crash" if step % 5 else "hang", "over", step)
            alerts.send_news()
        alerts.close()
    assert sum(text.count("over\n") for text in command_messages(run_dir)) == 3
    clock[0] += 3599
    alerts.send_news()
    clock[0] += 2
    again = Alerts(settings_with_command(run_dir), run_dir)
    again.send_news()
    again.send_news()
    again.close()
    *_, last = command_messages(run_dir)
    assert last.startswith("mine: over the hourly limit\n197 more events since ")
    assert last.endswith(": 158 crash, 39 hang\n")
    assert last.count("\n") == 2


def test_the_end_of_a_run_has_a_few_messages_over_the_limit(run_dir: Path) -> None:
    alerts = Alerts(settings_with_command(run_dir), run_dir)
    for _ in range(9):
        Journal(run_dir).write("crash", "exit status 1", 5)
        alerts.send_news()
    for _ in range(9):
        Journal(run_dir).write("done", "trained all steps", 10)
        alerts.send_news()
    alerts.close()
    messages = "".join(command_messages(run_dir))
    assert messages.count("exit status 1\n") == 3 and messages.count("trained all steps") == 4
    assert messages.count("6 more events since ") == 1


def test_a_damaged_count_and_an_unwritable_disk_are_survived(run_dir: Path) -> None:
    (run_dir / COUNT).write_text('{"sent": [', encoding="utf-8")
    assert Alerts(settings_with_command(run_dir), run_dir).send("hang", "mine: hang", "x") is True
    assert len(json.loads((run_dir / COUNT).read_text(encoding="utf-8"))["sent"]) == 1
    (run_dir / COUNT).unlink()
    (run_dir / COUNT).mkdir()
    alerts = Alerts(settings_with_command(run_dir), run_dir)
    assert [alerts.send("hang", "mine: hang", "x") for _ in range(5)] == [True] * 3 + [False] * 2
