"""What the supervisor waits for before a launch, and what it does meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from ds_gpt2.supervision import waiting
from ds_gpt2.supervision.cluster.away_reasons import AwayReasons
from ds_gpt2.supervision.context import TakenOverError
from ds_gpt2.supervision.supervisor import _Supervisor


class FakeCluster:
    """Hosts a and b, of which b is away."""

    spec = SimpleNamespace(hosts=["a", "b"])

    cut_off: tuple[str, ...] = ()

    def __init__(self, *problems: str) -> None:
        """
        Args:
            problems: why b cannot be used, at one attempt after another; then it can.
        """
        self.away = ["b"]
        self._problems = iter(problems)
        self._reasons = AwayReasons()

    @property
    def nodes(self) -> list[str]:
        return ["a"] if self.away else ["a", "b"]

    def newly_lost(self, reasons: dict[str, str]) -> dict[str, str]:
        return self._reasons.new(reasons, dict.fromkeys(self.away, "it has not answered for 10 s"))

    def reconnect(self) -> dict[str, str]:
        if (problem := next(self._problems, None)) is not None:
            return {"b": problem}
        self.away = []
        return {}


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(waiting, "_pause", lambda context, seconds: True)
    return _context(min_nodes=2)


def _context(min_nodes: int) -> Any:
    directories = {
        "directories.take_stop_file.return_value": False,
        "directories.run_was_relocated.return_value": False,
    }
    supervisor = SimpleNamespace(backoff_seconds=5.0, longest_backoff_seconds=60.0)
    settings = SimpleNamespace(supervisor=supervisor, cluster=SimpleNamespace(min_nodes=min_nodes))
    return mock.Mock(settings=settings, stop=SimpleNamespace(requested=False), **directories)


def _reports(context: Any) -> list[str]:
    return [call.args[1] for call in context.reporter.report.call_args_list]


def test_each_reason_of_a_host_that_cannot_be_used_is_reported_once(context: Any) -> None:
    timeout = "ssh: ssh: connect to host b port 22: Connection timed out: `ssh b true` must work without a password"
    clock = "its clock is {} s ahead of that of this machine: synchronize both"
    context.settings.cluster.min_nodes = 1
    cluster: Any = FakeCluster(timeout, clock.format("3.1"), clock.format("3.2"), "the data: x on a, y on b")
    for _ in range(5):
        assert waiting.wait_for_hosts(context, cluster)
    assert _reports(context) == [
        "host b is lost: it has not answered for 10 s",
        "host b cannot be used: " + clock.format("3.1"),
        "host b cannot be used: the data: x on a, y on b",
        "host b answers again",
    ]
    cluster.away = ["b"]
    assert waiting.wait_for_hosts(context, cluster)
    assert _reports(context)[4:] == ["host b is lost: it has not answered for 10 s", "host b answers again"]


def test_waiting_for_hosts_is_reported_again_only_for_another_reason(context: Any) -> None:
    silence = "connect to host b: timed out after {} s"
    cluster: Any = FakeCluster(*(silence.format(seconds) for seconds in (5, 6, 7)), "connect to host b: refused")
    assert waiting.wait_for_hosts(context, cluster)
    few = [text for text in _reports(context) if "waiting for more" in text]
    start = "1 host of 2 answer, cluster.min_nodes is 2: waiting for more (b: connect to host b: "
    assert few == [start + "timed out after 5 s)", start + "refused)"]


@pytest.fixture
def blocked() -> Iterator[Callable[[], None]]:
    """A function that does not return during the test."""
    end = threading.Event()

    def wait() -> None:
        end.wait(60)

    yield wait
    end.set()


def test_alerts_are_sent_and_a_stop_is_noticed_while_hosts_do_not_answer(blocked: Callable[[], None]) -> None:
    context, cluster = _context(1), mock.Mock(away=["b"], cut_off=[], reconnect=blocked)
    cluster.newly_lost.return_value = {}
    context.directories.take_stop_file.side_effect = [False, False, True]
    start = time.monotonic()
    assert not waiting.wait_for_hosts(context, cluster)
    assert time.monotonic() - start < 30 and context.poll.call_count == 2


def test_a_takeover_is_noticed_while_hosts_do_not_answer(blocked: Callable[[], None]) -> None:
    context = _context(1)
    context.poll.side_effect = TakenOverError("another")
    with pytest.raises(TakenOverError):
        waiting.run_polled(context, blocked)


def test_the_errors_of_an_action_are_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        waiting.run_polled(_context(1), lambda: 1 // 0)


@pytest.mark.parametrize("is_restart", [True, False])
def test_hosts_that_are_lost_while_checkpoints_are_missing_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, is_restart: bool
) -> None:
    """The launch would have no host. Before the first one, a host may be away with ranks that cannot be ended."""
    supervisor = object.__new__(_Supervisor)
    cluster: Any = SimpleNamespace(nodes=["a"], away=[] if is_restart else ["b"])
    supervisor._context, supervisor._cluster = _context(1), cluster
    supervisor._launches = mock.Mock(next_is_restart=is_restart)
    calls: list[str] = []

    def wait_for_hosts(context: object, cluster: Any) -> bool:
        calls.append("hosts")
        cluster.nodes = ["a"]
        return True

    def wait_for_checkpoints(context: object, resume: object) -> bool:
        calls.append("checkpoints")
        cluster.nodes = [] if len(calls) == 2 else ["a"]
        return True

    monkeypatch.setattr(waiting, "wait_for_writable_logs", lambda context: True)
    monkeypatch.setattr(waiting, "wait_for_hosts", wait_for_hosts)
    monkeypatch.setattr(waiting, "wait_for_checkpoints", wait_for_checkpoints)
    assert supervisor._wait_until_ready(mock.Mock())
    assert calls == ["hosts", "checkpoints"] * 2


def test_a_run_without_any_host_is_not_changed() -> None:
    cluster, run = mock.Mock(slots=0), mock.Mock()
    assert waiting.on_hosts(_context_with_batch(), cluster, run) is run
    cluster.slots = 3
    assert waiting.on_hosts(_context_with_batch(), cluster, run) is not run
    run.on_ranks.assert_called_once_with(2, 2)


def _context_with_batch() -> Any:
    return mock.Mock(**{"settings.batch": SimpleNamespace(tokens_per_step=512, micro_batch=2, sequence_length=64)})
