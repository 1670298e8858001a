"""Alerts about the events of a run's journal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from alert_service import Service, alert_events, command_messages, settings_with_command, wait_for, write_addresses
from launched import PROJECT

from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir.journal import JOURNAL, Journal, read_journal
from ds_gpt2.supervision.alerts.alerts import Alerts
from ds_gpt2.supervision.alerts.channels import ADDRESSES


def test_news_is_one_message_with_the_next_step(run_dir: Path, service: Service) -> None:
    journal = Journal(run_dir)
    journal.write("crash", "before this process", 1)
    alerts = Alerts(AlertSettings(kinds=("crash", "gave_up", "alert")), run_dir)
    alerts.send_news()
    journal.write("save", "saved rolling_step_000005", 5)
    journal.write("crash", "rank 1: RuntimeError: out of luck", 1234)
    journal.write("gave_up", "9 starts in a row made no progress", 1230)
    alerts.send_news()
    wait_for(lambda: alert_events(run_dir))  # the delivery is in the journal
    alerts.send_news()  # and no message is sent about it
    alerts.close()
    (message,) = service.received
    assert message["title"] == "mine: gave up, crash"
    gave_up, crash, next_step = message["message"].split("\n\n")
    assert gave_up.startswith("9 starts in a row made no progress\nstep 1,230, ")
    assert crash.startswith("rank 1: RuntimeError: out of luck\nstep 1,234, ")
    assert next_step == f"read {run_dir}/train.log, fix the cause, then run `./launch.sh resume {run_dir}`"
    assert alert_events(run_dir) == ["sent mine: gave up, crash"]


def test_an_incomplete_line_waits_and_a_new_journal_is_read_from_its_start(run_dir: Path) -> None:
    journal = run_dir / "journal.jsonl"
    line = json.dumps({"time": 1.0, "kind": "crash", "step": 1, "text": "the first"}) + "\n"
    alerts = Alerts(settings_with_command(run_dir), run_dir)
    for part in (line[:20], line[20:]):
        with journal.open("a", encoding="utf-8") as file:
            file.write(part)
        alerts.send_news()
    wait_for(lambda: alert_events(run_dir))  # so that the delivery's own event is read, too
    alerts.send_news()
    journal.write_text("no JSON\n[]\n" + line.replace("first", "2nd"), encoding="utf-8")
    alerts.send_news()
    alerts.close()
    assert sum("the first" in text for text in command_messages(run_dir)) == 1
    assert sum("the 2nd" in text for text in command_messages(run_dir)) == 1


def test_a_check_for_news_opens_no_file(run_dir: Path, service: Service) -> None:
    Journal(run_dir).write("crash", "long ago")
    alerts = Alerts(AlertSettings(), run_dir)
    opened = []
    sys.addaudithook(lambda event, what: opened.append(what) if event == "open" else None)  # cannot be removed
    alerts.send_news()
    assert opened == []


def test_an_event_that_the_journal_cannot_take_is_sent_once(run_dir: Path) -> None:
    alerts, journal = Alerts(settings_with_command(run_dir), run_dir), Journal(run_dir)
    (run_dir / JOURNAL).mkdir()  # stands for a full disk
    for kind in ("crash", "save"):
        missed = journal.write(kind, "rank 1: killed")
        assert missed is not None
        alerts.send_event(missed)
    (run_dir / JOURNAL).rmdir()
    journal.write_pending()
    alerts.send_news()
    alerts.close()
    (message,) = command_messages(run_dir)
    kinds = [event.kind for event in read_journal(run_dir) if event.kind != "alert"]  # by another thread, at any time
    assert "rank 1: killed" in message and kinds == ["crash", "save"]


def test_a_thousand_simultaneous_events_are_one_short_message(run_dir: Path) -> None:
    alerts = Alerts(settings_with_command(run_dir), run_dir)
    with (run_dir / "journal.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1000):
            kind = "spike" if number < 700 else "not_finite"
            file.write(json.dumps({"time": 0.0, "kind": kind, "step": number, "text": f"event {number}"}) + "\n")
    alerts.send_news()
    alerts.close()
    (message,) = command_messages(run_dir)
    assert message.startswith("mine: not finite, spike\nevent 999\nstep 999, ")
    assert message.rstrip().endswith(": 700 spike, 292 not finite") and "992 more events since " in message
    assert len(message) < 4000


def test_nothing_happens_without_a_channel(run_dir: Path) -> None:
    alerts = Alerts(AlertSettings(), run_dir)
    Journal(run_dir).write("crash", "exit status 1")
    alerts.send_news()
    assert alerts.send("crash", "mine: crash", "exit status 1") is False
    alerts.close()
    assert [file.name for file in run_dir.iterdir()] == ["journal.jsonl"]


def test_while_the_file_of_addresses_is_unusable_its_last_addresses_are_used(
    run_dir: Path, service: Service, log_messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESSES)
    file = write_addresses(run_dir.parent / "urls", service.address)
    alerts = Alerts(AlertSettings(urls_file=file), run_dir)
    file.chmod(0o644)
    for _ in range(3):
        assert alerts.send("crash", "mine: crash", "exit status 1") is True
    assert log_messages == [f"alerts: {file} contains passwords and can be read by other users: chmod 600 {file}"]
    file.chmod(0o600)
    file.write_text("", encoding="utf-8")
    assert alerts.send("hang", "mine: hang", "stuck") is False
    alerts.close()
    assert service.titles == 3 * ["mine: crash"]


def test_pending_messages_are_retried_while_the_file_of_addresses_is_unusable(
    run_dir: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESSES)
    file = write_addresses(run_dir.parent / "urls", service.address)
    alerts = Alerts(AlertSettings(urls_file=file), run_dir)
    service.status = 503
    assert alerts.send("crash", "mine: crash", "exit status 1") is False
    service.status = 200
    file.chmod(0o644)
    assert alerts.send("hang", "mine: hang", "stuck") is True
    alerts.close()
    assert service.titles == ["mine: hang and 1 more"]


def test_a_command_is_used_although_the_file_of_addresses_never_was_usable(run_dir: Path) -> None:
    file = write_addresses(run_dir.parent / "urls", "json://other", 0o644)
    settings = settings_with_command(run_dir).model_copy(update={"urls_file": file})
    alerts = Alerts(settings, run_dir)
    assert alerts.send("crash", "mine: crash", "exit status 1") is True
    alerts.close()
    assert len(command_messages(run_dir)) == 1


def test_alerts_import_neither_torch_nor_apprise() -> None:
    code = "import sys, ds_gpt2.supervision.alerts.alerts; print({'torch', 'apprise', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
