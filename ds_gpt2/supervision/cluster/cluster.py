"""The hosts of a supervised run: connect to their agents, check them, and launch the ranks on those that answer."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.distributed.launch_environment import LOOPBACK
from ds_gpt2.distributed.network_interface import variables_of
from ds_gpt2.run_dir.supervisor_record import AgentRecord
from ds_gpt2.supervision.cluster import environment, host_checks
from ds_gpt2.supervision.cluster.cluster_ranks import ClusterRanks
from ds_gpt2.supervision.cluster.host_checks import Network, Node
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError, StartMethod
from ds_gpt2.supervision.cluster.messages import LaunchRequest
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


class Cluster:
    """The hosts of one run, for one supervisor."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.accelerator = spec.accelerator
        self._links: dict[str, AgentLink] = {}  # host -> its newest connection
        self._nodes: dict[str, Node] = {}
        self._previous: dict[str, AgentRecord] = {}  # host -> the agent that was lost there
        self._groups: dict[str, int] = {}  # host -> process group of its newest ranks
        self._noted_lost: set[str] = set()  # hosts that ``newly_lost`` has returned, and that are still away
        self._numbers = itertools.count(1)

    def connect(self) -> dict[str, str]:
        """Connect to all hosts; return those that do not answer or cannot read the run, and why."""
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
        """Decide whether the ranks use GPUs, and check that each host has enough.

        Raises:
            UserError: it has not, or only some of the hosts have GPUs.
        """
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
        """Return the hosts that have stopped to answer since the last call, and why; not those that were cut off.

        Args:
            reasons: host -> why it is lost, where that is known.
        """
        lost = [name for name in self.away if name in self._links and name not in self.cut_off]
        away = {name: reasons.get(name) or self._links[name].problem for name in lost}
        new = {name: reason or "it does not answer" for name, reason in away.items() if name not in self._noted_lost}
        self._noted_lost = set(lost)
        return new

    @property
    def slots(self) -> int:
        """The number of ranks that the hosts that answer can run."""
        return sum(node.host.slots for node in self.nodes)

    def reconnect(self) -> dict[str, str]:
        """Connect to hosts that do not answer; return those that still do not, or do not fit the others, and why."""
        missing = [host for host in self.spec.hosts if host.name in self.away]
        problems = self._connect(missing)
        for host in missing:
            if host.name in problems:
                continue
            try:
                self._check_again(host)
            except UserError as error:
                problems[host.name] = str(error)
                self._drop(host.name)
        self._noted_lost &= set(self.away)
        return problems

    def launch(self, run: SupervisedRun, run_dir: Path | None = None) -> ClusterRanks:
        """Launch the ranks of ``run`` on the first of the hosts that answer.

        Args:
            run_dir: for heartbeats and reports, a directory of all hosts; None: that of the run.

        Raises:
            UserError: rank 0 cannot be reached, or no host answers.
        """
        nodes, slots = _divide(self.nodes, run.layout.ranks)
        if sum(slots) < run.layout.ranks:
            answering = ", ".join(node.host.name for node in nodes) or "none"
            raise UserError(f"{counted(run.layout.ranks, 'rank')} do not fit the hosts that answer: {answering}")
        network = self._network(nodes)
        number = next(self._numbers)
        shared = environment.passed_on(os.environ)
        requests = [
            LaunchRequest(
                number,
                run.script,
                tuple(run.command()),
                run.layout.accelerator,
                Place(slots, place, network.address, network.port),
                {**shared, **_interfaces(interface), **run.environment},
                run_dir or self.spec.run_dir,
                self.spec.stop_seconds,
            )
            for place, interface in enumerate(network.interfaces)
        ]
        ranks = ClusterRanks([(node.link, request) for node, request in zip(nodes, requests, strict=True)])
        self._groups |= ranks.groups
        return ranks

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

    def end_left_over(self, agents: Sequence[AgentRecord]) -> None:
        """End the agents of an earlier supervisor, and the ranks that they have left."""
        left = [agent for agent in agents if agent.host in self._links]
        host_checks.on_all(lambda agent: self._end_agent(self._links[agent.host], agent), left)

    def agents(self) -> tuple[AgentRecord, ...]:
        """Return the agents of all hosts, and the process groups of their ranks."""
        return tuple(
            AgentRecord(host, *link.agent, self._groups.get(host))
            for host, link in self._links.items()
            if link.agent is not None
        )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all agents."""
        for link in self._links.values():
            link.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for link in self._links.values():
            if not link.wait(deadline - time.monotonic() if link.is_open else 0.0):
                link.kill()

    def _connect(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Start agents on ``hosts`` and ask them about their hosts; return the problems by host."""
        for host in hosts:
            self._drop(host.name)
            self._links[host.name] = AgentLink(host.name, "local" if is_this_machine(host.name) else self.spec.launch)
        problems = host_checks.on_all(self._welcome, hosts)
        return {host.name: problem for host, problem in zip(hosts, problems, strict=True) if problem is not None}

    def _welcome(self, host: Host) -> str | None:
        """Wait for the agent of ``host`` and ask it about its host; return the problem, if any."""
        link = self._links[host.name]
        try:
            link.wait_for_start()
            if (previous := self._previous.get(host.name)) is not None:
                self._end_agent(link, previous)
                del self._previous[host.name]
            self._nodes[host.name] = host_checks.node_of(host, link, self.spec.arguments, self.accelerator)
        except LostHostError as error:
            return str(error)
        except UserError as error:
            return str(error).removeprefix(f"host {host.name}: ")
        return None

    def _end_agent(self, link: AgentLink, agent: AgentRecord) -> None:
        """Let the present agent of a host end an earlier one and its ranks.

        Raises:
            LostHostError, UserError: it does not.
        """
        seconds = self.spec.stop_seconds
        words = {"agent": [agent.pid, agent.start], "stop_seconds": seconds}
        link.call("end_previous", seconds + _KILL_SECONDS, **words)

    def _check_again(self, host: Host) -> None:
        """Check that a host that answers again fits the others."""
        nodes = self.nodes
        others = [node for node in nodes if node.host != host]
        node = self._nodes[host.name]
        host_checks.check_slots([node], self.accelerator)
        if others:
            host_checks.check_equal([others[0], node])
            host_checks.check_shared([others[0], node], self._shared)

    def _drop(self, name: str) -> None:
        """Forget the connection to a host; remember its agent, which may still run."""
        self._nodes.pop(name, None)
        if (link := self._links.pop(name, None)) is not None:
            if link.agent is not None:
                self._previous.setdefault(name, AgentRecord(name, *link.agent, self._groups.get(name)))
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


def is_this_machine(host: str) -> bool:
    """Return whether ``host`` is a name or an address of this machine."""
    if host in (*LOOPBACK, socket.gethostname()):
        return True
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    try:
        return not own.isdisjoint(str(found[4][0]) for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def _divide(nodes: Sequence[Node], ranks: int) -> tuple[list[Node], tuple[int, ...]]:
    """Return the nodes that run ``ranks`` ranks, and how many each runs: the first nodes are filled first."""
    chosen: list[Node] = []
    slots: list[int] = []
    for node in nodes:
        if (left := ranks - sum(slots)) > 0:
            chosen.append(node)
            slots.append(min(left, node.host.slots))
    return chosen, tuple(slots)


def _interfaces(interface: str | None) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use ``interface``, unless the user has set them."""
    if interface is None:
        return {}
    return {name: value for name, value in variables_of(interface).items() if name not in os.environ}
