"""What an agent does when a disk does not answer, a signal arrives, or something is left of an earlier launch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from ds_gpt2.common.process_identity import start_of
from ds_gpt2.run_dir.stop_request import supervisor_environment
from ds_gpt2.supervision.cluster import agent as agents
from ds_gpt2.supervision.cluster.agent import Agent, end_previous
from ds_gpt2.supervision.cluster.channel import Outbox
from ds_gpt2.supervision.cluster.link import AGENT
from ds_gpt2.supervision.cluster.messages import NodeReport, encode

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def _until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Return a function that starts a process in a group of its own, as a launcher that has not started ranks yet."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


class FakeRanks:
    """The ranks of a launch: a process group, or none."""

    def __init__(self, group: int = 2**22 + 1) -> None:
        self.group = group
        self.have_exited = False
        self.requests: list[str] = []

    def kill(self) -> None:
        self.requests.append("kill")

    def write_stacks(self, *_: object) -> None:
        self.requests.append("stacks")


class FakeLaunch:
    """A launch whose directory may not answer."""

    def __init__(self, ranks: FakeRanks) -> None:
        self.ranks: Any = ranks
        self.stop_seconds = 30.0
        self.answers = threading.Event()
        self.is_waiting = threading.Event()
        self.heartbeats = self

    def _wait(self) -> None:
        self.is_waiting.set()
        self.answers.wait(60)

    def report(self) -> None:
        self._wait()

    def stopped(self) -> set[int]:
        self._wait()
        return set()

    def problem(self) -> None:
        self._wait()

    heartbeat_problem = agents._Launch.heartbeat_problem


class Served:
    """An agent in this process, and the supervisor's end of its connection."""

    def __init__(self, launch: Any = None) -> None:
        requests, self._input = os.pipe()
        output, messages = os.pipe()
        self._output = os.fdopen(output, "rb")
        self.messages: list[dict[str, Any]] = []
        self.agent = Agent(Outbox(messages))
        self.agent._launch = launch
        self._thread = threading.Thread(target=self.agent.serve, args=(requests,), daemon=True)
        self._thread.start()
        threading.Thread(target=self._read, daemon=True).start()

    def request(self, number: int, what: str, **parameters: object) -> None:
        os.write(self._input, encode({"id": number, "do": what, **parameters}))

    def reply(self, number: int, seconds: float = 30) -> dict[str, Any]:
        _until(lambda: any(message.get("id") == number for message in self.messages), seconds)
        return next(message for message in self.messages if message.get("id") == number)

    @property
    def is_serving(self) -> bool:
        return self.agent._end_reason is None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._input)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _read(self) -> None:
        for line in self._output:
            self.messages.append(json.loads(line))


def test_a_disk_that_does_not_answer_ends_nothing_and_delays_only_what_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(agents, "_DISK_SECONDS", 0.3)
    ranks = FakeRanks()
    launch = FakeLaunch(ranks)
    served = Served(launch)
    assert launch.is_waiting.wait(30)  # in a report
    served.request(1, "stopped")
    served.request(2, "heartbeat_problem")
    served.request(3, "stacks", run_dir="run", directory="stacks")
    for number in range(100, 120):
        served.request(number, "ping")
        time.sleep(0.1)
        assert "value" in served.reply(number, 0.5)
    assert served.is_serving and ranks.requests == ["stacks"]
    assert served.reply(2)["value"] == "the directory of the run has not answered for 0 s"
    assert not any(message.get("id") == 1 or "report" in message for message in served.messages)
    launch.answers.set()
    assert served.reply(1)["value"] == []
    served.close()


def test_an_agent_that_ends_does_not_report_that_its_ranks_have_exited() -> None:
    """Then the supervisor sees the loss of the host, not a crash."""
    launch: Any = FakeLaunch(FakeRanks())
    launch.report = lambda: NodeReport(1, False, True, False, "exit status 4", 4, False, None, {}, {}, {})
    served = Served(launch)
    _until(lambda: any("report" in message for message in served.messages))
    with served.agent._launching:  # the ranks are not ended yet
        served.agent.end("a reason")
        _until(lambda: {"end": "a reason"} in served.messages)
        time.sleep(1.2)
    served.close()
    (number,) = [number for number, message in enumerate(served.messages) if "end" in message]
    assert not any("report" in message for message in served.messages[number + 2 :])  # one may have been under way


def test_an_agent_that_hears_nothing_ends_the_ranks(monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    monkeypatch.setattr(agents, "SILENCE_SECONDS", 0.5)
    launcher = spawn()
    launch = FakeLaunch(FakeRanks(launcher.pid))
    served = Served(launch)
    assert launcher.wait(30) == -signal.SIGTERM
    _until(lambda: {"end": served.agent._end_reason} in served.messages)
    assert str(served.agent._end_reason).startswith("it has not heard of the supervisor for ")
    assert served.agent._connection_is_lost
    served.close()


def test_time_in_which_the_agent_was_stopped_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    agent = Agent(Outbox(os.open(os.devnull, os.O_WRONLY)))
    passes: Sequence[float] = (0.1, 1000.0, 0.1, 1000.0, *[0.1] * 200)
    left = iter(passes)

    def sleep(_: float) -> None:
        nonlocal now
        now += next(left)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    agent._wait_for_end()
    assert 2008 < now < 2012  # ten seconds of silence: two of them are those in which it was stopped


def test_a_mistake_of_the_agent_ends_the_ranks_and_is_named(spawn: Spawn) -> None:
    launcher = spawn()
    launch: Any = FakeLaunch(FakeRanks(launcher.pid))
    launch.report = {}  # cannot be called
    served = Served(launch)
    assert launcher.wait(30) == -signal.SIGTERM
    _until(lambda: any("end" in message for message in served.messages))
    assert "its agent has failed: TypeError: " in str(served.agent._end_reason)
    served.close()


def test_a_launch_is_refused_while_an_earlier_one_runs_and_when_the_agent_ends() -> None:
    ranks = FakeRanks()
    served = Served(FakeLaunch(ranks))
    served.request(1, "launch", request={})
    assert "of an earlier launch still ran: it is killed" in served.reply(1)["error"]
    assert ranks.requests == ["kill"]
    served.agent._launch = None
    served.agent.end("a reason")
    served.request(2, "launch", request={})
    assert served.reply(2)["error"] == "a reason"
    served.close()


def test_what_an_earlier_agent_has_left_is_ended_even_if_no_rank_has_started(spawn: Spawn) -> None:
    """A process id that is used again, after a reboot, too, belongs to another agent."""
    earlier = spawn()
    start = start_of(earlier.pid)
    name, _ = supervisor_environment().popitem()
    launcher = spawn(**{name: f"{earlier.pid} {start}"})
    others = [spawn(**{name: f"{earlier.pid} {start}0"}), spawn()]
    assert end_previous([earlier.pid, start], 30.0)
    assert earlier.wait(30) == -signal.SIGKILL and launcher.wait(30) == -signal.SIGTERM
    assert [process.poll() for process in others] == [None, None]
    assert not end_previous([earlier.pid, start], 30.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_an_agent_ends_at_a_signal_but_not_at_that_of_the_terminal(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert "hello" in json.loads(process.stdout.readline())
    process.send_signal(number)
    if number == signal.SIGINT:
        process.stdin.write(encode({"id": 1, "do": "ping"}))
        process.stdin.flush()
        assert "value" in json.loads(process.stdout.readline())
        process.stdin.close()
    (end,) = [json.loads(line)["end"] for line in process.stdout]
    expected = "the supervisor has closed the connection" if number == signal.SIGINT else f"received {number.name}: "
    assert expected in end
    assert process.wait(30) == 0
    process.stdin.close()
    process.stdout.close()
