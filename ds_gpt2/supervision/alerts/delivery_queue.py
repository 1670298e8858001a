"""Deliver messages to all channels in a thread, and retry those that a channel did not accept."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from ds_gpt2.common.formatting import HOUR, counted, duration
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts.channels import LIMIT_SECONDS, Channel, deliver
from ds_gpt2.supervision.alerts.message import Message, combine

FIRST_RETRY_SECONDS = 10.0  # doubled before each further attempt
LONGEST_RETRY_SECONDS = 900.0
KEPT_SECONDS: float = 6 * HOUR  # older messages are dropped
KEPT_MESSAGES = 20  # per channel; the oldest are dropped first

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """The messages that a channel has not accepted yet."""

    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=KEPT_MESSAGES))
    failures: int = 0  # in a row
    reason: str = ""  # of the newest failure
    next_attempt: float = 0.0  # as time.monotonic

    def add_failure(self, now: float, reason: str = "") -> None:
        self.reason = reason or self.reason
        self.next_attempt = now + min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(self.failures, 30))
        self.failures += 1


@dataclass(frozen=True)
class _Post:
    message: Message
    was_delivered: Future[bool] = field(default_factory=Future)  # by any channel, at the first attempt


class DeliveryQueue:
    """The messages of one run. No method raises, and only ``close`` waits."""

    def __init__(self, channels: Callable[[], Sequence[Channel]], run_dir: Path) -> None:
        """
        Args:
            channels: is called for each delivery, so that channels can be changed during a run; does not raise.
        """
        self._channels = channels
        self._journal = Journal(run_dir)
        self._posts: queue.SimpleQueue[_Post | None] = queue.SimpleQueue()  # None: the queue is closed
        self._pending: dict[Channel, _Pending] = {}
        self._thread: threading.Thread | None = None

    def post(self, message: Message) -> Future[bool]:
        """Queue ``message`` for all channels; the result is whether any of them accepted it at the first attempt."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
            self._thread.start()
        post = _Post(message)
        self._posts.put(post)
        return post.was_delivered

    def close(self, seconds: float = LIMIT_SECONDS + 5) -> None:
        """Attempt all pending deliveries once more, and wait for that at most ``seconds``."""
        if self._thread is not None:
            self._posts.put(None)
            self._thread.join(seconds)
            self._thread = None

    def _work(self) -> None:
        is_last = False
        while not is_last:
            posts, is_last = self._wait()
            try:
                self._deliver(posts, everything=bool(posts) or is_last)
            except Exception as error:  # its text may contain an address
                log.warning(f"alerts: {type(error).__name__} while sending a message")
                for pending in self._pending.values():
                    pending.add_failure(time.monotonic())
            for post in posts:
                if not post.was_delivered.done():
                    post.was_delivered.set_result(False)
        for channel, pending in self._pending.items():
            if (count := len(pending.messages)) > 0:
                self._report(f"{_not_delivered(count)}: {_failure(channel, pending.reason)}", undelivered=count)

    def _wait(self) -> tuple[list[_Post], bool]:
        """Wait for a message or the next attempt; return the new messages, and whether the queue was closed."""
        attempts = [pending.next_attempt for pending in self._pending.values() if pending.messages]
        timeout = max(0.0, min(attempts) - time.monotonic()) if attempts else None
        posts = []
        with contextlib.suppress(queue.Empty):
            post = self._posts.get(timeout=timeout)
            while post is not None:
                posts.append(post)
                post = self._posts.get_nowait()
            return posts, True
        return posts, False

    def _deliver(self, posts: list[_Post], everything: bool) -> None:
        """Deliver new messages and those that are due.

        Args:
            everything: also deliver pending messages that are not due yet.
        """
        before, self._pending = self._pending, {}
        for channel in self._channels():
            pending = self._pending[channel] = before.get(channel, _Pending())
            self._drop_old(channel, pending)
            pending.messages.extend(post.message for post in posts)
        now = time.monotonic()
        due = {
            channel: combine(list(pending.messages))
            for channel, pending in self._pending.items()
            if pending.messages and (everything or pending.next_attempt <= now)
        }
        reasons = deliver(due)
        self._report_results(due, reasons)
        for channel, reason in reasons.items():
            if reason is None:
                self._pending[channel] = _Pending()
            else:
                self._pending[channel].add_failure(time.monotonic(), reason)
        for post in posts:
            post.was_delivered.set_result(None in reasons.values())

    def _drop_old(self, channel: Channel, pending: _Pending) -> None:
        recent = [message for message in pending.messages if message.time > time.time() - KEPT_SECONDS]
        if (dropped := len(pending.messages) - len(recent)) > 0:
            pending.messages = deque(recent, maxlen=KEPT_MESSAGES)
            text = f"{_not_delivered(dropped)} within {duration(KEPT_SECONDS)} and will not be retried"
            self._report(f"{text}: {_failure(channel, pending.reason)}")

    def _report_results(self, messages: dict[Channel, Message], reasons: dict[Channel, str | None]) -> None:
        """Write deliveries to the journal, and of repeated failures of a channel the first."""
        delivered = [channel for channel, reason in reasons.items() if reason is None]
        if delivered:
            titles = dict.fromkeys(messages[channel].title for channel in delivered)
            self._journal.write("alert", f"sent {'; '.join(titles)}", by=[channel.name for channel in delivered])
        for channel, reason in reasons.items():
            if reason is not None and not self._pending[channel].failures:
                self._report(f"{messages[channel].title!r} was not delivered, retrying: {_failure(channel, reason)}")

    def _report(self, text: str, **facts: int) -> None:
        log.warning(f"alerts: {text}")
        self._journal.write("alert", text, **facts)


def _not_delivered(count: int) -> str:
    return f"{counted(count, 'message')} {'was' if count == 1 else 'were'} not delivered"


def _failure(channel: Channel, reason: str) -> str:
    """Return how the newest attempt failed, such as ``the command failed with exit status 7``."""
    if reason.startswith("exit status"):
        return f"{channel.name} failed with {reason}"
    return f"{channel.name} failed ({reason})" if reason else f"{channel.name} failed"
