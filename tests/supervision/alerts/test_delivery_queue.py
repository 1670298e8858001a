"""Deliveries in the background, and their retries."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import psutil
import pytest
from alert_service import SECRET, Service, alert_events, wait_for

from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir.journal import Journal, read_journal
from ds_gpt2.supervision.alerts import apprise_child, delivery_queue
from ds_gpt2.supervision.alerts.alerts import Alerts
from ds_gpt2.supervision.alerts.channels import ADDRESSES


def _has_requests(service: Service, count: int) -> bool:
    return service.requests >= count


@pytest.mark.slow
def test_failed_deliveries_are_retried_as_one_message_with_the_newest_first(
    run_dir: Path,
    service: Service,
    log_messages: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery_queue, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(delivery_queue, "LONGEST_RETRY_SECONDS", 0.1)
    service.status = 503
    alerts = Alerts(AlertSettings(), run_dir)
    for number in range(3):
        Journal(run_dir).write("crash", f"crash number {number}", number)
        expected = service.requests + 1
        alerts.send_news()
        wait_for(functools.partial(_has_requests, service, expected))
    service.status = 200
    wait_for(lambda: service.received)
    alerts.close()
    (message,) = service.received
    assert message["title"] == "mine: crash and 2 more"
    positions = [message["message"].index(f"crash number {number}") for number in (2, 1, 0)]
    assert positions == sorted(positions)
    reason = f"address 1 of {ADDRESSES} failed (the service answered 503)"
    failed = f"'mine: crash' was not delivered, retrying: {reason}"
    assert alert_events(run_dir) == [failed, "sent mine: crash and 2 more"]
    assert log_messages == [f"alerts: {failed}"]
    everything = "".join(file.read_text(encoding="utf-8") for file in run_dir.iterdir()) + "".join(capfd.readouterr())
    assert SECRET not in everything and "127.0.0.1" not in everything


@pytest.mark.slow
def test_undelivered_messages_are_reported_at_the_end_and_old_ones_are_dropped(
    run_dir: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.close()
    monkeypatch.setattr(delivery_queue, "FIRST_RETRY_SECONDS", 0.01)
    alerts = Alerts(AlertSettings(), run_dir)
    assert alerts.send("crash", "mine: crash", "exit status 1") is False
    alerts.close()
    reason = f"address 1 of {ADDRESSES} failed (no connection)"
    assert alert_events(run_dir) == [
        f"'mine: crash' was not delivered, retrying: {reason}",
        f"1 message was not delivered: {reason}",
    ]
    monkeypatch.setattr(delivery_queue, "KEPT_SECONDS", 0.2)
    alerts.send("crash", "mine: crash", "exit status 1")
    wait_for(lambda: "will not be retried" in alert_events(run_dir)[-1])
    alerts.close()
    assert alert_events(run_dir)[-1] == f"1 message was not delivered within 0s and will not be retried: {reason}"


def test_undelivered_messages_are_counted_in_the_journal_at_the_end(run_dir: Path) -> None:
    alerts = Alerts(AlertSettings(command="exit 7"), run_dir)
    alerts.send("crash", "mine: crash", "exit status 1")
    alerts.send("done", "mine: done", "all steps")
    alerts.close()
    last = list(read_journal(run_dir))[-1]
    assert last.text == "2 messages were not delivered: the command failed with exit status 7"
    assert last.facts == {"undelivered": 2}


def test_a_new_message_is_sent_before_the_next_retry_is_due(run_dir: Path, service: Service) -> None:
    service.status = 500
    alerts = Alerts(AlertSettings(), run_dir)
    assert alerts.send("crash", "mine: crash", "exit status 1") is False
    service.status = 200
    assert alerts.send("hang", "mine: hang", "stuck") is True  # the retry is due in 10 seconds
    assert service.titles == ["mine: hang and 1 more"]
    alerts.close()


def test_the_caller_does_not_wait_and_no_process_shows_the_address(run_dir: Path, service: Service) -> None:
    service.answers.clear()
    alerts = Alerts(AlertSettings(), run_dir)
    Journal(run_dir).write("crash", "exit status 1")
    start = time.monotonic()
    alerts.send_news()
    assert time.monotonic() - start < 30  # the service waits for 60
    wait_for(lambda: service.requests)
    children = psutil.Process().children(recursive=True)
    assert any(str(apprise_child.__file__) in child.cmdline() for child in children)
    assert SECRET not in str([(child.cmdline(), child.environ()) for child in children])
    service.answers.set()
    alerts.close()
    assert service.titles == ["mine: crash"]


def test_a_failed_command_is_recorded(run_dir: Path) -> None:
    alerts = Alerts(AlertSettings(command="exit 3"), run_dir)
    assert alerts.send("hang", "mine: hang", "stuck") is False
    alerts.close()
    failed = "'mine: hang' was not delivered, retrying: the command failed with exit status 3"
    assert alert_events(run_dir)[0] == failed
