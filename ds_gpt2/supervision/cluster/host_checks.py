"""Compare what the agents of all hosts have found out, before any rank starts; the actions are in ``node_checks``."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds_gpt2.common import installation
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.common.shared_directory import not_shared
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError

_CALL_SECONDS = 60.0  # for an answer that needs PyTorch, the index of the data or a network disk
_CLOCK_SECONDS = 1.0  # the largest difference between two clocks: heartbeats and leases carry times

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A host whose agent answers."""

    host: Host
    link: AgentLink
    name: str  # the host's own name
    gpus: int | None  # None: not counted
    addresses: Mapping[str, list[str]]  # network interface -> IPv4 addresses
    same: Mapping[str, str]  # what must be equal on all hosts

    def call(self, what: str, **parameters: Any) -> Any:
        """Return the answer of the agent to a request.

        Raises:
            UserError: the agent refuses, or does not answer.
        """
        return call(self.link, what, **parameters)


def call(link: AgentLink, what: str, **parameters: Any) -> Any:
    """Return the answer of an agent to a request.

    Raises:
        UserError: the agent refuses, or does not answer.
    """
    try:
        return link.call(what, _CALL_SECONDS, **parameters)
    except LostHostError as error:
        raise UserError(f"host {link.host}: {error}") from None


def on_all(action: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Return the results of ``action`` for all items, computed at the same time; the first error is raised."""
    pool = ThreadPoolExecutor(max(1, len(items)))
    try:
        return list(pool.map(action, items))
    finally:
        pool.shutdown(wait=False)  # after Ctrl+C the threads end when the connections are closed


def node_of(host: Host, link: AgentLink, arguments: Sequence[str], accelerator: str) -> Node:
    """Return the node of a connected host.

    Args:
        arguments: of train.py.
        accelerator: GPUs are counted unless it is "cpu".

    Raises:
        UserError: the run cannot be read there, or the host's clock differs from this one.
    """
    check_clock(link)
    facts = call(link, "facts", arguments=list(arguments), cwd=str(Path.cwd()), accelerator=accelerator)
    return Node(host, link, facts["name"], facts["gpus"], facts["addresses"], facts["same"])


def check_clock(link: AgentLink) -> None:
    """Compare the clock of a host with that of this machine.

    Raises:
        UserError: they differ by more than a second.
    """
    before = time.time()
    there = float(call(link, "ping"))
    after = time.time()
    if (ahead := there - after) > _CLOCK_SECONDS or (ahead := there - before) < -_CLOCK_SECONDS:
        raise UserError(
            f"host {link.host}: its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of this"
            " machine: synchronize both (chrony, systemd-timesyncd)"
        )


def check_equal(nodes: Sequence[Node]) -> None:
    """Check that Python, the libraries, the code and the data are equal on all nodes.

    Raises:
        UserError: something differs.
    """
    for difference in differences(nodes):
        raise UserError(f"{difference}: make them equal")


def differences(nodes: Sequence[Node]) -> list[str]:
    """Return what differs between the first node and the others: Python, the libraries, the code and the data."""
    first = nodes[0]
    return [
        difference
        for node in nodes[1:]
        for difference in installation.differences(first.host.name, first.same, node.host.name, node.same)
    ]


def check_names(nodes: Sequence[Node]) -> None:
    """Check that every node has a host name of its own: locks, heartbeats and the run's record name the host.

    Raises:
        UserError: two have the same, perhaps because they are the same machine.
    """
    hosts: dict[str, str] = {}
    for node in nodes:
        if (other := hosts.setdefault(node.name, node.host.name)) != node.host.name:
            raise UserError(
                f"{other} and {node.host.name} have the same host name {node.name}: if they are one machine, list it"
                " once, with all its slots; otherwise rename one"
            )


def check_slots(nodes: Sequence[Node], accelerator: str) -> None:
    """Check that every node has a GPU for each of its ranks.

    Raises:
        UserError: a node has fewer.
    """
    for node in nodes if accelerator == "cuda" else ():
        if (node.gpus or 0) < node.host.slots:
            raise UserError(
                f"host {node.host.name}: slots={node.host.slots}, but it has {counted(node.gpus or 0, 'GPU')}"
            )


def check_shared(nodes: Sequence[Node], directories: Sequence[Path]) -> None:
    """Check that each directory is the same on all nodes: every node creates a file there, and all others must see it.

    Raises:
        UserError: a directory is not shared, or cannot be written on a node.
    """
    if len(nodes) == 1:
        return
    nonce = secrets.token_hex(8)
    names = {node.host.name: f"{nonce}-{number}" for number, node in enumerate(nodes)}
    hosts = {name: host for host, name in names.items()}
    paths = list(map(str, directories))
    try:
        marked = [node.call("mark", directories=paths, name=names[node.host.name]) for node in nodes]
        found = on_all(lambda node: node.call("has_marks", directories=marked[0], names=list(hosts)), nodes)
        for node, missing in zip(nodes, found, strict=True):
            for path, absent in zip(paths, missing, strict=True):
                if absent:
                    raise UserError(not_shared(path, node.host.name, hosts[absent[0]]))
    finally:
        on_all(lambda node: _unmark(node, paths, names[node.host.name]), nodes)


def _unmark(node: Node, directories: Sequence[str], name: str) -> None:
    """Delete the files that a node has created, also those of a request that it has not answered."""
    with contextlib.suppress(UserError):  # a host that is lost
        node.call("unmark", directories=directories, name=name)


@dataclass(frozen=True)
class Network:
    """How the ranks of all nodes reach rank 0."""

    address: str  # of the first node
    port: int
    interfaces: tuple[str | None, ...]  # of each node, for the connections between ranks; None: unknown
    round_trips: tuple[float, ...]  # seconds from each other node to the first


def find_network(nodes: Sequence[Node], interface: str | None = None) -> Network:
    """Find an address of the first node that all others reach, and the interface that each uses for it.

    Args:
        interface: use only addresses of this interface of the first node.

    Raises:
        UserError: there is no such address.
    """
    first, others = nodes[0], nodes[1:]
    if not others:
        return Network("127.0.0.1", first.call("free_port", address="127.0.0.1"), (None,), ())
    if interface is not None:
        _check_interface(nodes, interface)
    own = {address: name for name, found in first.addresses.items() for address in found}
    named = on_all(lambda node: node.call("resolve", name=first.host.name), others)
    addresses = dict.fromkeys([*sorted(address for found in named for address in found), *own])
    usable = {address for address in own if not address.startswith("127.") and interface in (None, own[address])}
    candidates = [address for address in addresses if address in usable]
    listener = first.call("listen")
    reached = on_all(lambda node: node.call("reach", addresses=candidates, listener=listener), others)
    for address in candidates:
        if all(address in found for found in reached):
            return Network(
                address,
                first.call("free_port", address=address),
                (own[address], *(interface or found[address]["interface"] for found in reached)),
                tuple(found[address]["round_trip"] for found in reached),
            )
    raise _no_network(
        first.host.name, candidates, {node.host.name: found for node, found in zip(others, reached, strict=True)}
    )


def _check_interface(nodes: Sequence[Node], interface: str) -> None:
    """Check that every node has the interface.

    Raises:
        UserError: one has not.
    """
    for node in nodes:
        if interface not in node.addresses:
            available = ", ".join(sorted(node.addresses))
            raise UserError(
                f"cluster.interface={interface}: host {node.host.name} has no such interface; it has {available}"
            )


def _no_network(first: str, candidates: Sequence[str], reached: Mapping[str, Collection[str]]) -> UserError:
    """Return why the nodes cannot be connected.

    Args:
        first: the first host.
        candidates: its addresses.
        reached: another host -> those of the addresses that it reaches; there is none that all reach.
    """
    fix = "check the firewall between them, or set cluster.interface"
    isolated = [host for host, found in reached.items() if not found]
    if isolated:
        tried = ", ".join(candidates) or f"{first} has no address besides that of the loopback interface"
        hosts = ", ".join(isolated)
        return UserError(f"host {hosts} cannot connect to {first} by IPv4 ({tried}), IPv6 is not used: {fix}")
    each = "; ".join(f"{host} reaches {', '.join(found)}" for host, found in reached.items())
    return UserError(f"no address of {first} can be reached from all hosts: {each}: {fix}")
