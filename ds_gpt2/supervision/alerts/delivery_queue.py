"""Takes messages to every way there is, in a thread of its own, and again to the ways that did not take them."""

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

from ds_gpt2.common.formatting import counted, duration
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts.channels import LIMIT_SECONDS, Channel, deliver
from ds_gpt2.supervision.alerts.message import Message, joined

FIRST_RETRY_SECONDS = 10.0  # and twice as long before each next one
LONGEST_RETRY_SECONDS = 900.0
KEPT_SECONDS = 6 * 3600.0  # after that nobody wants to know
KEPT_MESSAGES = 20  # of one way; the oldest go first

log = logging.getLogger(__name__)


@dataclass
class _Undelivered:
    """What one way has not taken yet."""

    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=KEPT_MESSAGES))
    failures: int = 0  # one after another
    reason: str = ""  # of the newest failure
    next_try: float = 0.0  # of time.monotonic

    def failed(self, now: float, reason: str = "") -> None:
        self.reason = reason or self.reason
        self.next_try = now + min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(self.failures, 30))
        self.failures += 1


@dataclass(frozen=True)
class _Post:
    message: Message
    taken: Future[bool] = field(default_factory=Future)  # by any way, at the first try


class Courier:
    """No method raises, and none but ``close`` waits."""

    def __init__(self, ways: Callable[[], Sequence[Channel]], run_dir: Path) -> None:
        """
        Args:
            ways: called each time, so that channels can be fixed while the run trains; does not raise.
        """
        self._ways = ways
        self._journal = Journal(run_dir)
        self._posts: queue.SimpleQueue[_Post | None] = queue.SimpleQueue()  # None: no more will come
        self._undelivered: dict[Channel, _Undelivered] = {}
        self._thread: threading.Thread | None = None

    def post(self, message: Message) -> Future[bool]:
        """Take ``message`` to every way. The result: whether at least one took it at the first try."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
            self._thread.start()
        post = _Post(message)
        self._posts.put(post)
        return post.taken

    def close(self, seconds: float = LIMIT_SECONDS + 5) -> None:
        """Try once more what is still to be taken, and wait for that, but no longer than ``seconds``."""
        if self._thread is not None:
            self._posts.put(None)
            self._thread.join(seconds)
            self._thread = None

    def _work(self) -> None:
        last = False
        while not last:
            posts, last = self._wait()
            try:
                self._round(posts, everything=bool(posts) or last)
            except Exception as error:  # its text may hold an address
                log.warning(f"alerts: {type(error).__name__} while a message was sent")
                for waiting in self._undelivered.values():
                    waiting.failed(time.monotonic())
            for post in posts:
                if not post.taken.done():
                    post.taken.set_result(False)
        for way, left in self._undelivered.items():
            if (count := len(left.messages)) > 0:
                self._tell(f"{_not_delivered(count)}: {_failure(way, left.reason)}", undelivered=count)

    def _wait(self) -> tuple[list[_Post], bool]:
        """Until there is something to do: what was posted meanwhile, and whether it was the last."""
        tries = [waiting.next_try for waiting in self._undelivered.values() if waiting.messages]
        timeout = max(0.0, min(tries) - time.monotonic()) if tries else None
        posts = []
        with contextlib.suppress(queue.Empty):
            post = self._posts.get(timeout=timeout)
            while post is not None:
                posts.append(post)
                post = self._posts.get_nowait()
            return posts, True
        return posts, False

    def _round(self, posts: list[_Post], everything: bool) -> None:
        """Deliver what is new, and what is due again; with ``everything``, what is not yet due as well."""
        before, self._undelivered = self._undelivered, {}
        for way in self._ways():
            waiting = self._undelivered[way] = before.get(way, _Undelivered())
            self._forget_old(way, waiting)
            waiting.messages.extend(post.message for post in posts)
        now = time.monotonic()
        due = {
            way: joined(list(waiting.messages))
            for way, waiting in self._undelivered.items()
            if waiting.messages and (everything or waiting.next_try <= now)
        }
        reasons = deliver(due)
        self._report(due, reasons)
        for way, reason in reasons.items():
            if reason is None:
                self._undelivered[way] = _Undelivered()
            else:
                self._undelivered[way].failed(time.monotonic(), reason)
        for post in posts:
            post.taken.set_result(None in reasons.values())

    def _forget_old(self, way: Channel, waiting: _Undelivered) -> None:
        kept = [message for message in waiting.messages if message.time > time.time() - KEPT_SECONDS]
        if (forgotten := len(waiting.messages) - len(kept)) > 0:
            waiting.messages = deque(kept, maxlen=KEPT_MESSAGES)
            text = f"{_not_delivered(forgotten)} within {duration(KEPT_SECONDS)} and will not be tried again"
            self._tell(f"{text}: {_failure(way, waiting.reason)}")

    def _report(self, messages: dict[Channel, Message], reasons: dict[Channel, str | None]) -> None:
        """What was told in the journal; of a way that fails again and again, the first time and the end of it."""
        took = [way.name for way, reason in reasons.items() if reason is None]
        if took:
            titles = dict.fromkeys(messages[way].title for way, reason in reasons.items() if reason is None)
            self._journal.write("alert", f"told {'; '.join(titles)}", by=took)
        for way, reason in reasons.items():
            if reason is not None and not self._undelivered[way].failures:
                self._tell(f"{way.name} did not take {messages[way].title!r} ({reason}): it is tried again")

    def _tell(self, text: str, **facts: int) -> None:
        log.warning(f"alerts: {text}")
        self._journal.write("alert", text, **facts)


def _not_delivered(count: int) -> str:
    return f"{counted(count, 'message')} {'was' if count == 1 else 'were'} not delivered"


def _failure(way: Channel, reason: str) -> str:
    """How the newest attempt failed, as ``the command failed with exit status 7``."""
    if reason.startswith("exit status"):
        return f"{way.name} failed with {reason}"
    return f"{way.name} failed ({reason})" if reason else f"{way.name} failed"
