"""The hosts of a supervised run: connect to their agents, check them, and launch the ranks on those that answer."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.distributed.network_interface import variables_of
from ds_gpt2.run_dir.supervisor_record import AgentRecord
from ds_gpt2.supervision.cluster import environment, host_checks
from ds_gpt2.supervision.cluster.away_reasons import AwayReasons
from ds_gpt2.supervision.cluster.cluster_ranks import ClusterRanks
from ds_gpt2.supervision.cluster.host_checks import Network, Node
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError, StartMethod
from ds_gpt2.supervision.cluster.messages import LaunchRequest
from ds_gpt2.supervision.cluster.this_machine import is_this_machine
from ds_gpt2.supervision.launcher import Place
from ds_gpt2.supervision.supervised_run import SupervisedRun

_SHOWN = 6  # hosts in a message
_KILL_SECONDS = 60.0  # for ranks to be gone after they were killed
_CLOSE_SECONDS = 10.0  # for agents to end after the ranks have


@dataclass(frozen=True)
class ClusterSpec:
    """What a cluster needs to know about the run."""

    hosts: Sequence[Host]
    launch: StartMethod  # how agents are started: ssh or srun
    interface: str | None  # see ``ClusterSettings``
    arguments: Sequence[str]  # of train.py
    accelerator: str  # auto, cuda or cpu
    run_dir: Path
    checkpoint_dir: Path
    stop_seconds: float  # for ranks to save


@dataclass
class LeftOver:
    """What an earlier supervisor has left on its hosts."""

    ended: set[str] = field(default_factory=set)  # hosts where agents or ranks were ended
    problems: dict[str, str] = field(default_factory=dict)  # host -> why that has failed
    unknown: set[str] = field(default_factory=set)  # hosts that are not connected


class Cluster:
    """The hosts of one run, for one supervisor."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.accelerator = spec.accelerator
        self._links: dict[str, AgentLink] = {}  # host -> its newest connection
        self._nodes: dict[str, Node] = {}
        self._previous: dict[str, AgentRecord] = {}  # host -> the agent that was lost there
        self._groups: dict[str, int] = {}  # host -> process group of its newest ranks
        self._reasons = AwayReasons()  # that ``newly_lost`` has returned
        self._numbers = itertools.count(1)
        self._network_of_launch: tuple[Network, list[str]] | None = None  # the newest, and its hosts

    def connect(self) -> dict[str, str]:
        """Connect to all hosts; return those that do not answer or cannot read the run, and why.

        This may take minutes where agents must first end what an earlier connection has left.
        """
        return self._connect(self.spec.hosts)

    def start(self) -> None:
        """Connect to all hosts and check them.

        Raises:
            UserError: a host does not answer, or does not fit the others.
        """
        if problems := self.connect():
            host, problem = next(iter(problems.items()))
            raise UserError(f"host {host}: {problem}")
        self.check_devices()
        host_checks.check_equal(self.nodes)
        self.check_shared()
        self.find_network()

    def check_devices(self) -> None:
        """Decide whether the ranks use GPUs, and check that each host has enough and is listed once.

        Raises:
            UserError: it has not, only some of the hosts have GPUs, or two have the same host name.
        """
        host_checks.check_names(self.nodes)
        self._choose_accelerator(self.nodes)
        host_checks.check_slots(self.nodes, self.accelerator)

    def check_shared(self) -> None:
        """Check that the directories of the run and its checkpoints are the same on all hosts.

        Raises:
            UserError: one is not.
        """
        host_checks.check_shared(self.nodes, self._shared)

    def find_network(self) -> Network:
        """Return how the ranks of all hosts reach rank 0.

        Raises:
            UserError: they do not.
        """
        return self._network(self.nodes)

    @property
    def nodes(self) -> list[Node]:
        """The hosts that answer, in the order of the hostfile."""
        return [
            self._nodes[host.name]
            for host in self.spec.hosts
            if host.name in self._nodes and self._nodes[host.name].link.is_open
        ]

    @property
    def away(self) -> list[str]:
        """The names of the hosts that do not answer."""
        answering = {node.host.name for node in self.nodes}
        return [host.name for host in self.spec.hosts if host.name not in answering]

    @property
    def cut_off(self) -> list[str]:
        """The hosts whose agents have ended because this process was stopped (SIGSTOP) or could not send to them."""
        return [name for name, link in self._links.items() if link.was_cut_off]

    def newly_lost(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Return the hosts that have stopped responding since the last call, or are away for a new reason, and why.

        Those that were cut off are not lost, unless they do not answer again.

        Args:
            reasons: host -> why it is away, where that is known.
        """
        links = {name: self._links.get(name) for name in self.away if name not in self.cut_off}
        problems = {name: link.problem if link is not None else None for name, link in links.items()}
        return self._reasons.new(reasons, {name: why or "it does not respond" for name, why in problems.items()})

    @property
    def slots(self) -> int:
        """The number of ranks that the hosts that answer can run."""
        return sum(node.host.slots for node in self.nodes)

    def reconnect(self) -> dict[str, str]:
        """Connect to hosts that are away; return those that do not answer or do not fit the others, and why.

        This may take minutes where agents must first end what an earlier connection has left.
        """
        missing = [host for host in self.spec.hosts if host.name in self.away]
        problems = self._connect(missing)
        for host in missing:
            if host.name in problems:
                continue
            try:
                self._check_again(host)
            except UserError as error:
                problems[host.name] = _without_host(error, host.name)
                self._drop(host.name)
        return problems

    def launch(self, run: SupervisedRun, run_dir: Path | None = None) -> ClusterRanks:
        """Launch the ranks of ``run`` on the first of the hosts that answer.

        Args:
            run_dir: for heartbeats and reports, a directory of all hosts; None: that of the run.

        Raises:
            UserError: rank 0 cannot be reached, no host answers, or one cannot start its ranks.
        """
        nodes, slots = _divide(self.nodes, run.layout.ranks)
        if sum(slots) < run.layout.ranks:
            answering = ", ".join(node.host.name for node in nodes) or "none"
            raise UserError(f"{counted(run.layout.ranks, 'rank')} do not fit the hosts that answer: {answering}")
        network = self._network(nodes)
        self._network_of_launch = network, [node.host.name for node in nodes]
        number = next(self._numbers)
        shared = environment.passed_on(os.environ)
        requests = [
            LaunchRequest(
                number,
                run.script,
                tuple(run.command()),
                run.layout.accelerator,
                Place(slots, number_of_node, network.address, network.port),
                {**shared, **_interface_variables(interface), **run.environment},
                run_dir or self.spec.run_dir,
                self.spec.stop_seconds,
            )
            for number_of_node, interface in enumerate(network.interfaces)
        ]
        ranks = ClusterRanks([(node.link, request) for node, request in zip(nodes, requests, strict=True)])
        self._groups = ranks.groups
        if ranks.refusals:
            ranks.end()
            raise UserError("; ".join(ranks.refusals))
        return ranks

    @property
    def network_facts(self) -> dict[str, Any]:
        """The address of rank 0 and the network interface of each host in the newest launch; empty on one host."""
        if self._network_of_launch is None or len(self._network_of_launch[1]) < 2:
            return {}
        network, names = self._network_of_launch
        return {"address": network.address, "interfaces": dict(zip(names, network.interfaces, strict=True))}

    def describe(self, ranks: int) -> str:
        """Return which hosts run ``ranks`` ranks, as text."""
        parts = [f"{host} ({count})" for host, count in self.ranks_by_host(ranks).items() if count]
        shown = parts if len(parts) <= _SHOWN else [*parts[: _SHOWN - 1], f"{len(parts) - _SHOWN + 1} other hosts"]
        return ", ".join(shown)

    def ranks_by_host(self, ranks: int) -> dict[str, int]:
        """Return how many of ``ranks`` ranks each host that answers runs, possibly none."""
        nodes, slots = _divide(self.nodes, ranks)
        counts = {node.host.name: count for node, count in zip(nodes, slots, strict=True)}
        return {node.host.name: counts.get(node.host.name, 0) for node in self.nodes}

    def end_left_over(self, agents: Sequence[AgentRecord]) -> LeftOver:
        """End the agents of an earlier supervisor, and the ranks that they have left.

        A host where that fails is away from then on.
        """
        left, failed = LeftOver(), dict[str, AgentRecord]()

        def end(agent: AgentRecord) -> None:
            if (name := self._host_with(agent)) is None:
                left.unknown.add(agent.host)
                return
            try:
                if self._end_agent(self._links[name], agent):
                    left.ended.add(name)
            except (LostHostError, UserError) as error:
                failed[name] = replace(agent, host=name)
                left.problems[name] = _without_host(error, name)

        host_checks.on_all(end, agents)
        for name, agent in failed.items():
            self._previous[name] = agent
            self._drop(name)
        return left

    def _host_with(self, agent: AgentRecord) -> str | None:
        """Return the name of the connected host of an agent, which may have had another name; None if there is none."""
        if agent.host in self._links:
            return agent.host
        local = next((name for name, link in self._links.items() if link.is_local), None)
        return local if local is not None and is_this_machine(agent.host) else None

    def agents(self) -> tuple[AgentRecord, ...]:
        """Return the agents of all hosts, also lost ones that may still run, and the process groups of their ranks."""
        connected = (
            AgentRecord(host, *link.agent, self._groups.get(host))
            for host, link in self._links.items()
            if link.agent is not None
        )
        return (*connected, *self._previous.values())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all agents. An agent on this machine may take ``stop_seconds``, for ranks that save."""
        links = list(self._links.values())
        for link in links:
            link.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for link in links:
            if not link.wait(deadline - time.monotonic() if link.is_open else 0.0):
                link.kill()

    def _connect(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Start agents on ``hosts`` and ask them about their hosts; return the problems by host."""
        problems: dict[str, str | None] = {}
        are_local = host_checks.on_all(lambda host: is_this_machine(host.name), hosts)
        for host, is_local in zip(hosts, are_local, strict=True):
            self._drop(host.name)
            try:
                self._links[host.name] = AgentLink(host.name, "local" if is_local else self.spec.launch)
            except UserError as error:  # possibly temporary, such as too many processes
                problems[host.name] = str(error)
        started = [host for host in hosts if host.name not in problems]
        found = host_checks.on_all(self._welcome, started)
        problems |= {host.name: problem for host, problem in zip(started, found, strict=True)}
        return {host.name: problem for host in hosts if (problem := problems[host.name]) is not None}

    def _welcome(self, host: Host) -> str | None:
        """Wait for the agent of ``host`` and ask it about its host; return the problem, if any."""
        link = self._links[host.name]
        try:
            link.wait_for_start()
            if (previous := self._previous.get(host.name)) is not None:
                self._end_agent(link, previous)
                del self._previous[host.name]
            self._nodes[host.name] = host_checks.node_of(host, link, self.spec.arguments, self.accelerator)
        except (LostHostError, UserError) as error:
            return _without_host(error, host.name)
        return None

    def _end_agent(self, link: AgentLink, agent: AgentRecord) -> bool:
        """Let the present agent of a host end an earlier one and its ranks; return whether there were any.

        Raises:
            LostHostError, UserError: it does not.
        """
        seconds = self.spec.stop_seconds
        parameters = {"agent": [agent.pid, agent.start], "stop_seconds": seconds}
        return bool(link.call("end_previous", seconds + _KILL_SECONDS, **parameters))

    def _check_again(self, host: Host) -> None:
        """Check that a host that answers again fits the others.

        Raises:
            UserError: it does not.
        """
        node = self._nodes[host.name]
        others = [other for other in self.nodes if other.host != host]
        host_checks.check_names([*others, node])
        host_checks.check_slots([node], self.accelerator)
        if others:
            first = others[0]  # the code may have been updated on all hosts since it was asked
            first = host_checks.node_of(first.host, first.link, self.spec.arguments, self.accelerator)
            self._nodes[first.host.name] = first
            host_checks.check_equal([first, node])
            host_checks.check_shared([first, node], self._shared)

    def _drop(self, name: str) -> None:
        """Forget the connection to a host; remember its agent, which may still run."""
        self._nodes.pop(name, None)
        group = self._groups.pop(name, None)
        if (link := self._links.pop(name, None)) is not None:
            if link.agent is not None:
                self._previous.setdefault(name, AgentRecord(name, *link.agent, group))
            link.kill()

    @property
    def _shared(self) -> tuple[Path, Path]:
        """The directories that all hosts must share."""
        return self.spec.run_dir, self.spec.checkpoint_dir

    def _network(self, nodes: Sequence[Node]) -> Network:
        return host_checks.find_network(nodes, self.spec.interface)

    def _choose_accelerator(self, nodes: Sequence[Node]) -> None:
        """Decide whether the ranks use GPUs: all hosts must have some, or none."""
        if self.accelerator != "auto":
            return
        without = [node.host.name for node in nodes if not node.gpus]
        if without and len(without) < len(nodes):
            raise UserError(f"host {without[0]} has no GPU, but another host has: remove it, or set run.device=cpu")
        self.accelerator = "cpu" if without else "cuda"


def _without_host(error: Exception, host: str) -> str:
    """Return the message of an error of a host, without its name at the beginning."""
    return str(error).removeprefix(f"host {host}: ")


def _divide(nodes: Sequence[Node], ranks: int) -> tuple[list[Node], tuple[int, ...]]:
    """Return the nodes that run ``ranks`` ranks, and how many each runs: the first nodes are filled first."""
    chosen: list[Node] = []
    slots: list[int] = []
    for node in nodes:
        if (left := ranks - sum(slots)) > 0:
            chosen.append(node)
            slots.append(min(left, node.host.slots))
    return chosen, tuple(slots)


def _interface_variables(interface: str | None) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use ``interface``, unless the user has set them."""
    if interface is None:
        return {}
    return {name: value for name, value in variables_of(interface).items() if name not in os.environ}
