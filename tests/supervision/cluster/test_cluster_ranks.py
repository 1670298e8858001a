"""The state of ranks on several hosts, from the reports of their agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.exit_codes import CRASHED, DONE, STOPPED
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision.cluster.cluster_ranks import ClusterRanks
from ds_gpt2.supervision.cluster.link import LostHostError
from ds_gpt2.supervision.cluster.messages import LaunchRequest, NodeReport, as_values, launch_request, node_report
from ds_gpt2.supervision.launcher import Place


class FakeLink:
    """The connection to a host whose agent the test plays."""

    def __init__(self, host: str, start_error: Exception | None = None) -> None:
        self.host = host
        self.problem: str | None = None
        self.report: NodeReport | None = None
        self.answers: dict[str, Any] = {}
        self.errors: dict[str, Exception | None] = {"launch": start_error}  # by request
        self.requests: list[str] = []

    def call(self, what: str, seconds: float, **parameters: object) -> Any:
        self.requests.append(what)
        if (error := self.errors.get(what)) is not None:
            raise error
        return self.answers.get(what)

    def request(self, what: str) -> None:
        self.requests.append(what)

    def kill(self) -> None:
        self.requests.append("the connection is ended")


class Stage:
    """Two hosts with two ranks each, and a clock."""

    def __init__(self, start_error: Exception | None = None) -> None:
        """
        Args:
            start_error: of host b.
        """
        self.now = 0.0
        self.a, self.b = FakeLink("a"), FakeLink("b", start_error)
        links: Any = [(link, self.request(node)) for node, link in enumerate((self.a, self.b))]
        self.ranks = ClusterRanks(links, clock=lambda: self.now)

    @staticmethod
    def request(node: int) -> LaunchRequest:
        return LaunchRequest(1, Path("x"), (), "cpu", Place((2, 2), node, "10.0.0.1", 1), {}, Path("run"), 5.0)

    def report(self, link: FakeLink, step: int = 0, launch: int = 1, **changes: Any) -> None:
        first = 0 if link is self.a else 2
        beats = (
            {rank: Beat(step, 1.0, 10 + rank, step, step, "training") for rank in (first, first + 1)} if step else {}
        )
        values: dict[str, Any] = {
            "launch": launch, "launcher_runs": True, "has_exited": False, "launcher_was_killed": False,
            "exit_status": None, "exit_code": None, "ran_out_of_memory": False, "outcome": None, "failures": {},
            "kills": {}, "beats": beats,
        }  # fmt: skip
        if "exit_code" in changes:
            values |= {"launcher_runs": False, "has_exited": True, "exit_status": f"exit status {changes['exit_code']}"}
        report = NodeReport(**{**values, **changes})
        link.report = node_report(as_values(report))


def test_messages_survive_the_way_over_json() -> None:
    request = Stage.request(1)
    assert launch_request(as_values(request)) == request
    stage = Stage()
    stage.report(stage.b, 7, outcome=Outcome(4, 12, (3, 4)), failures={2: "an error"})
    report: Any = stage.b.report
    assert report.outcome == Outcome(4, 12, (3, 4)) and report.failures == {2: "an error"}
    assert report.beats[3].step == 7


def test_all_hosts_end_as_they_should() -> None:
    stage = Stage()
    assert stage.ranks.is_launcher_running and not stage.ranks.have_exited
    stage.report(stage.a, 5)
    stage.report(stage.b, 5, exit_code=DONE)
    assert stage.ranks.is_launcher_running and not stage.ranks.have_exited and not stage.ranks.are_stuck
    stage.report(stage.a, 5, exit_code=DONE, outcome=Outcome(DONE))
    assert stage.ranks.have_exited and not stage.ranks.is_launcher_running
    assert stage.ranks.outcome() == Outcome(DONE) and stage.ranks.lost_hosts == {}


def test_a_report_of_an_earlier_launch_is_ignored() -> None:
    stage = Stage()
    stage.report(stage.a, 50, launch=0, exit_code=1, failures={0: "old"})
    assert stage.ranks.is_launcher_running and stage.ranks.failures() == {} and stage.ranks.read() == [None] * 4


def test_ranks_that_wait_for_failed_ones_are_stuck_after_a_while() -> None:
    stage = Stage()
    stage.report(stage.a, 5)
    stage.report(stage.b, 5, exit_code=1, kills={3: "SIGKILL"})
    assert not stage.ranks.is_launcher_running and not stage.ranks.are_stuck
    stage.now = 9.0
    stage.report(stage.a, 6)  # still moves
    assert not stage.ranks.are_stuck
    stage.now = 20.0
    assert stage.ranks.are_stuck
    assert stage.ranks.exit_status == "host b: exit status 1" and stage.ranks.kills() == {3: "SIGKILL"}


def test_rank_0_may_save_for_long_after_the_other_host_has_stopped() -> None:
    stage = Stage()
    stage.report(stage.a, 5)
    stage.report(stage.b, 5, exit_code=STOPPED)
    assert not stage.ranks.is_launcher_running
    stage.now = 1000.0
    assert not stage.ranks.are_stuck


@pytest.mark.parametrize("starts", [True, False])
def test_a_lost_host_counts_as_exited_and_the_others_as_stuck(starts: bool) -> None:
    stage = Stage(None if starts else LostHostError("the connection to its agent has ended"))
    stage.report(stage.a, 5)
    if starts:
        stage.report(stage.b, 5)
        assert stage.ranks.is_launcher_running
        stage.b.problem = "it has not answered for 11 s"
    assert not stage.ranks.is_launcher_running and stage.b.requests[-1] == "the connection is ended"
    reason = "it has not answered for 11 s" if starts else "the connection to its agent has ended"
    assert stage.ranks.lost_hosts == {"b": reason}
    assert not stage.ranks.is_launcher_running and not stage.ranks.have_exited
    stage.now = 11.0
    assert stage.ranks.are_stuck
    stage.report(stage.a, 5, exit_code=1)
    assert stage.ranks.have_exited
    assert stage.ranks.outcome() == Outcome(CRASHED) and stage.ranks.exit_status == f"host b: {reason}"


def test_a_host_that_is_lost_after_its_ranks_have_exited_does_not_matter() -> None:
    stage = Stage()
    stage.report(stage.b, 5, exit_code=DONE)
    assert not stage.ranks.have_exited
    stage.b.problem = "the connection to its agent has ended"
    stage.report(stage.a, 5, exit_code=DONE, outcome=Outcome(DONE))
    assert stage.ranks.have_exited and stage.ranks.lost_hosts == {}


def test_the_first_failure_to_arrive_is_the_first() -> None:
    stage = Stage()
    stage.report(stage.b, failures={3: "the cause"})
    assert stage.ranks.failures() == {3: "the cause"}
    stage.report(stage.a, failures={0: "connection reset", 1: "connection reset"})
    assert list(stage.ranks.failures()) == [3, 0, 1]


def test_requests_reach_all_hosts() -> None:
    stage = Stage()
    stage.ranks.request_stop()
    stage.ranks.kill()
    stage.ranks.write_stacks(Path("run"), Path("stacks"))
    assert stage.a.requests == stage.b.requests == ["launch", "stop", "kill", "stacks"]


def test_a_lost_connection_that_is_reported_earlier_is_not_the_cause() -> None:
    stage = Stage()
    lost = "RuntimeError: [/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    stage.report(stage.a, exit_code=1, failures={1: lost, 0: lost})
    assert list(stage.ranks.failures()) == [1, 0]
    stage.report(stage.b, exit_code=2, failures={3: lost, 2: "RuntimeError: the cause"})
    assert next(iter(stage.ranks.failures())) == 2
    assert stage.ranks.exit_status == "host b: exit status 2"


def test_hosts_are_asked_for_stopped_ranks_and_problems_of_heartbeats() -> None:
    stage = Stage()
    stage.a.answers = {"stopped": [0], "heartbeat_problem": None}
    stage.b.answers = {"stopped": [2, 3], "heartbeat_problem": "No space left on device"}
    assert stage.ranks.stopped() == {0, 2, 3} and stage.ranks.problem() == "No space left on device"


def test_a_host_that_cannot_start_its_ranks_is_not_lost() -> None:
    stage = Stage(UserError("host b: Is a directory"))
    assert stage.ranks.refusals == ["host b: Is a directory"] and stage.ranks.lost_hosts == {}
    assert stage.b.requests == ["launch"] and not stage.ranks.is_launcher_running
    assert not stage.ranks.have_exited
    stage.report(stage.a, exit_code=-9)
    assert stage.ranks.have_exited


def test_a_host_whose_ranks_cannot_be_killed_is_lost_after_a_minute() -> None:
    stage = Stage()
    stage.report(stage.a, 5, exit_code=-9)
    stage.report(stage.b, 5)
    stage.ranks.kill()
    stage.now = 59.0
    stage.ranks.kill()
    assert not stage.ranks.have_exited and stage.ranks.lost_hosts == {}
    stage.now = 61.0
    assert stage.ranks.lost_hosts == {"b": "its processes have not exited 60 s after they were killed"}
    assert stage.ranks.have_exited and stage.b.requests[-1] == "the connection is ended"


def test_hosts_that_write_no_stacks_are_named() -> None:
    stage = Stage()
    stage.a.errors["stacks"] = LostHostError("it has not answered for 11 s")
    with pytest.raises(OSError, match=r"^host a: it has not answered for 11 s$"):
        stage.ranks.write_stacks(Path("run"), Path("stacks"))
    assert stage.b.requests[-1] == "stacks"
    stage.b.errors["stacks"] = UserError("host b: No space left on device")
    with pytest.raises(OSError, match=r"^host a: it has not answered for 11 s; host b: No space left on device$"):
        stage.ranks.write_stacks(Path("run"), Path("stacks"))


def test_the_time_of_a_start_does_not_count_as_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call(self: FakeLink, what: str, seconds: float, **parameters: object) -> None:
        nonlocal now
        now += 20.0
        raise UserError("host b: no")

    monkeypatch.setattr(FakeLink, "call", call)
    links: Any = [(FakeLink("b"), Stage.request(0))]
    ranks = ClusterRanks(links, clock=lambda: now)
    assert not ranks.are_stuck
    now += 11.0
    assert ranks.are_stuck
