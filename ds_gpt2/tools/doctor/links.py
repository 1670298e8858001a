"""Measure the network between the hosts of a run, link by link, and name the slow links."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster.host_checks import Node
from ds_gpt2.tools.doctor.finding import Finding, failure

ALL_PAIRS = 8  # hosts; of more hosts only the links of a ring are measured

_SECONDS = 0.5  # for each direction
_SLOW_BANDWIDTH = 100e6  # bytes per second: less than Gigabit Ethernet has
_SLOW_ROUND_TRIP = 2e-3  # seconds: more than within a building
_USUAL_ROUND_TRIP = 0.5e-3  # seconds: not compared with other links below it
_TIMES_SLOWER = 2.0  # bandwidth, against the median of the other links
_TIMES_LONGER = 4.0  # round trip, likewise
_FIX = (
    "check cable, port, driver and other traffic (`ethtool INTERFACE`, `ip -s link`); cluster.interface selects another"
    " network"
)


@dataclass(frozen=True)
class Link:
    """The measured connection of two hosts."""

    one: str
    other: str
    there: float  # bytes per second from ``one`` to ``other``
    back: float  # bytes per second
    round_trip: float  # seconds, median

    @property
    def bandwidth(self) -> float:
        """Bytes per second in the slower direction."""
        return min(self.there, self.back)


def pairs(count: int) -> list[tuple[int, int]]:
    """Return the numbers of the hosts whose links are measured: all pairs, or the ring of many hosts."""
    if count <= ALL_PAIRS:
        return list(itertools.combinations(range(count), 2))
    return [(number, (number + 1) % count) for number in range(count)]


def check_links(nodes: Sequence[Node], interfaces: Sequence[str | None]) -> list[Finding]:
    """Measure the links of ``nodes``, one after another; return a finding for each.

    Args:
        interfaces: of each node, those that the ranks use; None: unknown.
    """
    links: list[Link] = []
    failures: list[Finding] = []
    for first, second in pairs(len(nodes)):
        one, other = nodes[first], nodes[second]
        try:
            links.append(_measure((one, interfaces[first]), (other, interfaces[second])))
        except UserError as error:
            failures.append(failure(f"{one.host.name} - {other.host.name}", error))
    return [*failures, *findings(links)]


def findings(links: Sequence[Link]) -> list[Finding]:
    """Judge each link by absolute limits and by the median of the others."""
    return [_finding(link, [each for each in links if each is not link]) for link in links]


def _measure(one: tuple[Node, str | None], other: tuple[Node, str | None]) -> Link:
    """Measure the link of two nodes, given with their interfaces.

    Raises:
        UserError: they cannot connect, or one is lost.
    """
    listener = other[0].call("listen")
    reached = one[0].call("reach", addresses=_addresses(*other), listener=listener)
    if not reached:
        raise _not_connected(one[0], other[0])
    round_trip = float(next(iter(reached.values()))["round_trip"])
    names = one[0].host.name, other[0].host.name
    return Link(*names, _bandwidth(one, other), _bandwidth(other, one), round_trip)


def _bandwidth(sender: tuple[Node, str | None], receiver: tuple[Node, str | None]) -> float:
    listener = sender[0].call("send_stream")
    addresses = _addresses(*sender)
    rate = receiver[0].call("receive_stream", addresses=addresses, listener=listener, duration=_SECONDS)
    if rate is None:
        raise _not_connected(receiver[0], sender[0])
    return float(rate)


def _not_connected(one: Node, other: Node) -> UserError:
    return UserError(
        f"{one.host.name} cannot connect to {other.host.name}: set firewall rules that allow all ports between them"
    )


def _addresses(node: Node, interface: str | None) -> list[str]:
    """Return the addresses of a node's interface; all that other hosts may reach if it is not known."""
    if interface is not None and interface in node.addresses:
        return list(node.addresses[interface])
    return [address for found in node.addresses.values() for address in found if not address.startswith("127.")]


def _finding(link: Link, others: Sequence[Link]) -> Finding:
    found = f"{_rate(link.there)} there, {_rate(link.back)} back, round trip {link.round_trip * 1e3:.2f} ms"
    problems = _problems(link, others)
    name = f"{link.one} - {link.other}"
    if not problems:
        return Finding(name, "ok", found)
    return Finding(name, "warn", f"slow link: {found}; {'; '.join(problems)}", _FIX)


def _problems(link: Link, others: Sequence[Link]) -> list[str]:
    """Return why a link counts as slow."""
    problems = []
    if others and link.bandwidth * _TIMES_SLOWER < (usual := statistics.median(each.bandwidth for each in others)):
        problems.append(f"the median of the other links is {_rate(usual)}")
    elif link.bandwidth < _SLOW_BANDWIDTH:
        problems.append("less than Gigabit Ethernet has")
    usual = statistics.median(each.round_trip for each in others) if others else link.round_trip
    if link.round_trip > max(_USUAL_ROUND_TRIP, _TIMES_LONGER * usual):
        problems.append(f"the median round trip of the other links is {usual * 1e3:.2f} ms")
    elif link.round_trip > _SLOW_ROUND_TRIP:
        problems.append(f"the round trip is longer than {_SLOW_ROUND_TRIP * 1e3:.0f} ms")
    return problems


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.1f} MB/s"
