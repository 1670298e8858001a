"""The hosts of a run, played by agents on this machine that have two names of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.supervisor_record import SUPERVISOR_DIR, AgentRecord
from ds_gpt2.supervision.cluster import cluster as cluster_module
from ds_gpt2.supervision.cluster import host_checks, link
from ds_gpt2.supervision.cluster.cluster import Cluster, ClusterSpec
from ds_gpt2.supervision.cluster.host_checks import Network, Node, check_names
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.supervised_run import SupervisedRun

A, B = "localhost", "127.0.0.1"


@pytest.fixture
def cluster(tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two connected hosts."""
    monkeypatch.setattr(host_checks, "check_names", lambda nodes: None)  # they have the same
    config = write_config(tmp_path)
    run_dir = tmp_path / "runs" / "test"
    (run_dir / SUPERVISOR_DIR).mkdir(parents=True)
    hosts = [Host(A, 1), Host(B, 1)]
    spec = ClusterSpec(hosts, "ssh", None, ("--config", str(config)), "cpu", run_dir, tmp_path / "checkpoints", 5.0)
    with Cluster(spec) as connected:
        assert connected.connect() == {}
        yield connected


def _lose(cluster: Cluster, host: str) -> None:
    """Kill the agent of a host."""
    agent = cluster._links[host].agent
    assert agent is not None
    os.kill(agent[0], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while host not in cluster.away:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ranks
def test_a_launch_that_one_host_refuses_is_ended_on_all(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster.spec.run_dir / SUPERVISOR_DIR / "outcome_1").mkdir()
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n")
    network = Network("127.0.0.1", 29998, ("lo", "lo"), ())
    monkeypatch.setattr(host_checks, "find_network", lambda *_: network)
    with pytest.raises(UserError, match=rf"^host {B}: .*[Dd]irectory"):
        cluster.launch(SupervisedRun((), RankLayout("cpu", 2), script=script))
    assert cluster.away == [] and cluster.newly_lost({}) == {}
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(script) in command]
    assert cluster.network_facts == {"address": "127.0.0.1", "interfaces": {A: "lo", B: "lo"}}


def test_a_host_that_is_back_but_differs_is_away_for_a_new_reason(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose(cluster, B)
    assert list(cluster.newly_lost({})) == [B] and cluster.newly_lost({}) == {}
    original = host_checks.node_of

    def node_of(host: Host, *arguments: Any) -> Node:
        return replace(original(host, *arguments), same={"torch": host.name})

    monkeypatch.setattr(host_checks, "node_of", node_of)
    difference = f"torch: {A} on {A}, {B} on {B}: make them equal"
    problems = cluster.reconnect()
    assert problems == {B: difference} and cluster.away == [B]
    assert cluster.newly_lost(problems) == problems and cluster.newly_lost(problems) == {}


def test_a_host_is_compared_with_what_the_others_have_now(cluster: Cluster) -> None:
    """The code may have been updated on all hosts meanwhile."""
    _lose(cluster, B)
    cluster._nodes[A] = replace(cluster._nodes[A], same={"the code of ds_gpt2": "old"})
    assert cluster.reconnect() == {} and cluster.away == []


def test_ssh_that_cannot_be_started_is_a_problem_of_the_host(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    _lose(cluster, B)
    monkeypatch.setattr(link, "start_command", lambda host, way: ["/nowhere/ssh"])
    assert cluster.reconnect() == {B: "/nowhere/ssh cannot be started: No such file or directory"}
    assert [node.host.name for node in cluster.nodes] == [A]
    monkeypatch.undo()
    monkeypatch.setattr(host_checks, "check_names", lambda nodes: None)
    assert cluster.reconnect() == {}


def test_an_agent_that_was_lost_is_recorded_until_it_is_ended(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = cluster.agents()
    cluster._groups[B] = 4_000_000  # no process has it
    _lose(cluster, B)
    monkeypatch.setattr(cluster_module, "AgentLink", _cannot_start)
    assert list(cluster.reconnect()) == [B]
    assert cluster.agents() == (first, replace(second, group=4_000_000))
    monkeypatch.setattr(cluster_module, "AgentLink", AgentLink)
    assert cluster.reconnect() == {}
    (_, present) = cluster.agents()
    assert present.host == B and present.pid != second.pid and present.group is None


def _cannot_start(host: str, way: str) -> None:
    raise UserError("ssh cannot be started: Resource temporarily unavailable")


def test_a_host_whose_left_over_ranks_cannot_be_ended_is_away(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = AgentLink.call

    def fails(self: AgentLink, what: str, seconds: float, **parameters: Any) -> Any:
        if what == "end_previous" and self.host == B:
            raise LostHostError("it has not answered the request 'end_previous' within 65 s")
        return call(self, what, seconds, **parameters)

    left = AgentRecord(B, 1, "0.other boot", 4_000_000)
    monkeypatch.setattr(AgentLink, "call", fails)
    result = cluster.end_left_over([replace(left, host=A), left, replace(left, host="gone")])
    assert (result.ended, result.unknown) == (set(), {"gone"})
    assert result.problems == {B: "it has not answered the request 'end_previous' within 65 s"}
    assert cluster.away == [B] and left in cluster.agents()
    assert cluster.newly_lost(result.problems) == result.problems
    monkeypatch.setattr(AgentLink, "call", call)
    assert cluster.reconnect() == {} and left not in cluster.agents()


def test_left_over_ranks_are_ended_although_their_host_has_another_name(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "is_this_machine", lambda host: host in (A, B, "host-a"))
    old = AgentLink("localhost", "local")
    old.wait_for_start()
    assert old.agent is not None
    assert cluster.end_left_over([AgentRecord("host-a", *old.agent)]).ended == {A}
    assert old.wait(30) and cluster.end_left_over([AgentRecord("host-a", *old.agent)]).ended == set()


def test_two_hosts_with_the_same_host_name_are_refused(cluster: Cluster) -> None:
    nodes = cluster.nodes
    name = nodes[0].name
    with pytest.raises(UserError, match=rf"^{A} and {B} have the same host name {name}: if they are one machine, list"):
        check_names(nodes)
    check_names([nodes[0], replace(nodes[1], name="other")])
