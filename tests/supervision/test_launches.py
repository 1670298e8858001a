"""The end of a launch: the text of a crash names its cause, and a stop before the first step is recognized."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.exit_codes import CRASHED, STOPPED
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision import launches as launches_module
from ds_gpt2.supervision import waiting
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.launches import Launches, _crash_text

LOST = {0: "RuntimeError: connection closed by peer"}


@pytest.mark.parametrize(
    ("failures", "kills", "text"),
    [
        (LOST, {1: "SIGKILL"}, "rank 1 was killed by SIGKILL; rank 0: RuntimeError: connection closed by peer"),
        ({}, {0: "SIGKILL", 1: "SIGSEGV"}, "rank 0 was killed by SIGKILL; rank 1 was killed by SIGSEGV"),
        ({}, {1: "SIGKILL"}, "rank 1 was killed by SIGKILL"),
        (LOST, {}, "rank 1 exited without an error message; rank 0: RuntimeError: connection closed by peer; STATUS"),
        ({}, {}, "rank 0, 1 exited without an error message; STATUS"),
    ],
)
def test_a_killed_rank_is_named_before_the_errors_that_it_causes(
    failures: dict[int, str], kills: dict[int, str], text: str
) -> None:
    ranks: Any = mock.Mock(count=2, ran_out_of_memory=False, exit_status="STATUS", lost_hosts={})
    ranks.failures.return_value, ranks.kills.return_value = failures, kills
    assert _crash_text(ranks, "exited", Outcome(CRASHED)) == text


def test_the_journal_has_the_hosts_of_a_launch_and_those_that_were_lost() -> None:
    context: Any = mock.MagicMock(**{"reporter.events_since.return_value": [], "stop.requested": False})
    cluster: Any = mock.Mock(**{"ranks_by_host.return_value": {"a": 2, "b": 2}, "launch.side_effect": OSError("no")})
    cluster.cut_off = []
    cluster.newly_lost.side_effect = [{}, {"b": "no answer"}]
    Launches(context, False, cluster).run(mock.MagicMock(**{"layout.ranks": 4}))
    launch = context.reporter.add_event.call_args
    assert launch.args[0] == "launch" and launch.kwargs == {"restart": False, "hosts": {"a": 2, "b": 2}}
    ranks: Any = mock.Mock(**{"outcome.return_value": Outcome(CRASHED), "lost_hosts": {"b": "no answer"}})
    ranks.failures.return_value, ranks.kills.return_value = {}, {}
    Launches(context, False, cluster)._summarize(ranks, "exited", Beat(1, 0.0, 1, 7, 7, "training"), 0)
    text = "host b is lost: no answer"
    assert context.reporter.report.call_args_list[1] == mock.call("host_lost", text, 7, host="b", reason="no answer")


def test_hosts_that_did_not_hear_of_the_supervisor_are_not_lost() -> None:
    context: Any = mock.MagicMock(**{"reporter.events_since.return_value": [], "stop.requested": False})
    cluster: Any = mock.Mock(cut_off=["a", "b"], **{"newly_lost.return_value": {}})
    lost = {"a": "it has not heard of the supervisor for 10 s", "b": "it has not heard of the supervisor for 10 s"}
    ranks: Any = mock.Mock(**{"outcome.return_value": Outcome(STOPPED, supervisor_lost=True), "lost_hosts": lost})
    result = Launches(context, False, cluster)._summarize(ranks, "exited", Beat(1, 0.0, 1, 7, 7, "training"), 0)
    text = "the ranks on a, b were ended: this supervisor was stopped (SIGSTOP), or its messages did not arrive"
    context.reporter.report.assert_called_once_with("crash", text, 7)
    assert result.outcome.code == CRASHED and result.lost_hosts == ("a", "b")  # restarted, as after the loss of a host


def test_a_cluster_connects_again_to_hosts_that_were_cut_off_without_reports() -> None:
    context: Any = mock.MagicMock(**{"directories.run_was_relocated.return_value": False})
    context.settings.supervisor.backoff_seconds, context.settings.cluster.min_nodes = 1.0, 2
    cluster = Cluster(mock.Mock(hosts=[Host("a", 2), Host("b", 2)]))
    problem = "it has not heard of the supervisor for 10 s"
    cluster._links = {name: mock.Mock(is_open=False, problem=problem, was_cut_off=name == "a") for name in ("a", "b")}
    assert cluster.away == ["a", "b"] and cluster.newly_lost({}) == {"b": problem}
    with mock.patch.object(Cluster, "reconnect", lambda self: self._nodes.update(_nodes(cluster)) or {}):
        assert waiting.wait_for_hosts(context, cluster)
    (event,) = context.reporter.report.call_args_list
    assert event == mock.call("host_back", "host b answers again", host="b")


def _nodes(cluster: Cluster) -> dict[str, Any]:
    return {host.name: mock.Mock(host=host) for host in cluster.spec.hosts}


def test_only_hosts_that_a_failed_launch_has_lost_excuse_it() -> None:
    """Others may be away for days, while the ranks of the rest cannot be started."""
    context: Any = mock.MagicMock(**{"stop.requested": False, "directories.saved_step.return_value": 5})
    cluster: Any = mock.Mock(
        away=["c"], **{"launch.side_effect": UserError("host b: no"), "ranks_by_host.return_value": {}}
    )
    cluster.newly_lost.side_effect = [{}, {"b": "it does not respond"}]
    launches = Launches(context, False, cluster)
    run: Any = mock.MagicMock(**{"layout.ranks": 4})
    assert launches.run(run).lost_hosts == ()
    context.reporter.report.assert_called_once_with("crash", "the ranks cannot be started: host b: no")
    assert launches.run(run).lost_hosts == ("b",)


def test_the_event_of_a_launch_has_the_network_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches_module, "RankWatch", mock.Mock())
    context: Any = mock.MagicMock(**{"reporter.events_since.return_value": []})
    network = {"address": "10.0.0.1", "interfaces": {"a": "eth0", "b": "eth1"}}
    cluster: Any = mock.Mock(network_facts=network, **{"ranks_by_host.return_value": {"a": 2, "b": 2}})
    cluster.launch.return_value.outcome.return_value = Outcome(STOPPED)
    cluster.newly_lost.return_value = {}
    launches = Launches(context, True, cluster)
    monkeypatch.setattr(launches, "_summarize", mock.Mock())
    launches.run(mock.MagicMock(**{"layout.ranks": 4}))
    facts = context.reporter.add_event.call_args.kwargs
    assert facts == {"restart": True, "hosts": {"a": 2, "b": 2}, **network}


@pytest.mark.parametrize(
    ("step", "phase", "code"),
    [(0, "starting", STOPPED), (7, "training", CRASHED), (7, "saving", CRASHED), (0, "evaluating", CRASHED)],
)
def test_steps_are_noticed_at_a_stop_if_the_journal_cannot_be_read(step: int, phase: str, code: int) -> None:
    context: Any = mock.Mock(**{"reporter.events_since.return_value": [], "stop.requested": True})
    ranks: Any = mock.Mock(**{"outcome.return_value": Outcome(CRASHED), "lost_hosts": {}})
    launches = Launches(context, is_restart=False)
    result = launches._summarize(ranks, "exited", Beat(1, 0.0, 1, step, step, phase), 0)
    assert result.outcome == Outcome(code)
    assert context.reporter.report.called == (code == STOPPED)  # "nothing to save"
    assert launches.has_started == (code == CRASHED)
