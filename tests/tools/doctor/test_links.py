"""The checks of the links between hosts: which are measured, which count as slow, and what an agent measures."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ds_gpt2.supervision.cluster import link_speed
from ds_gpt2.supervision.cluster.host_checks import Node
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink
from ds_gpt2.tools.doctor.links import Link, check_links, findings, pairs

FAST = Link("node1", "node2", 3e9, 3.2e9, 50e-6)


def test_all_pairs_of_few_hosts_are_measured_and_a_ring_of_many() -> None:
    assert pairs(1) == []
    assert pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(pairs(8)) == 28
    ring = pairs(9)
    assert len(ring) == 9 and ring[0] == (0, 1) and ring[-1] == (8, 0)


def test_fast_links_are_ok() -> None:
    (row,) = findings([FAST])
    assert (row.name, row.status) == ("node1 - node2", "ok")
    assert row.found == "3.00 GB/s there, 3.20 GB/s back, round trip 0.05 ms"


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (Link("node1", "node3", 1.4e9, 3e9, 50e-6), "the median of the other links is 3.00 GB/s"),
        (Link("node1", "node3", 3e9, 1.4e9, 50e-6), "the median of the other links is 3.00 GB/s"),
        (Link("node1", "node3", 3e9, 3e9, 0.9e-3), "the median round trip of the other links is 0.05 ms"),
    ],
)
def test_a_link_that_is_slower_than_the_others_is_named(link: Link, reason: str) -> None:
    others = [FAST, Link("node2", "node3", 3e9, 3e9, 50e-6), Link("node2", "node4", 2.9e9, 3e9, 60e-6)]
    rows = {row.name: row for row in findings([*others, link])}
    assert [name for name, row in rows.items() if row.status == "warn"] == ["node1 - node3"]
    assert rows["node1 - node3"].found.startswith("slow link: ") and rows["node1 - node3"].found.endswith(reason)
    assert "ethtool" in rows["node1 - node3"].fix


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (Link("node1", "node2", 3e9, 1.2e6, 50e-6), "less than Gigabit Ethernet has"),
        (Link("node1", "node2", 3e9, 3e9, 5e-3), "the round trip is longer than 2 ms"),
    ],
)
def test_the_only_link_is_judged_by_absolute_limits(link: Link, reason: str) -> None:
    (row,) = findings([link])
    assert row.status == "warn" and row.found.endswith(f"; {reason}")


def test_short_round_trips_are_not_compared() -> None:
    """They depend on what else the processors do."""
    rows = findings([FAST, Link("node1", "node3", 3e9, 3e9, 0.4e-3), Link("node2", "node3", 3e9, 3e9, 20e-6)])
    assert [row.status for row in rows] == ["ok"] * 3


def test_the_rate_is_that_of_the_sender() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            with contextlib.suppress(OSError):
                start_time = time.monotonic()
                for number in range(200):
                    theirs.sendall(bytes(40_000))
                    time.sleep(max(0.0, start_time + 0.01 * (number + 1) - time.monotonic()))

        threading.Thread(target=send, daemon=True).start()
        assert link_speed._rate(ours, 0.5) == pytest.approx(4e6, rel=0.25)


def test_a_sender_that_ends_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"x")
        theirs.close()
        with pytest.raises(ConnectionResetError, match="the other host has closed the connection"):
            link_speed._rate(ours, 0.5)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Return two nodes whose agents run on this machine."""
    links = [AgentLink(name, "local") for name in ("node1", "node2")]
    for link in links:
        link.wait_for_start()
    yield [Node(Host(link.host, 1), link, link.host, None, {"lo": ["127.0.0.1"]}, {}) for link in links]
    for link in links:
        link.close()
        assert link.wait(20)


def test_agents_measure_a_link_in_about_a_second(nodes: list[Node]) -> None:
    start_time = time.monotonic()
    (row,) = check_links(nodes, ["lo", "lo"])
    assert 1.0 <= time.monotonic() - start_time < 30
    pattern = r"(slow link: )?[\d.]+ [GM]B/s there, [\d.]+ [GM]B/s back, round trip [\d.]+ ms.*"  # slow if busy
    assert row.name == "node1 - node2" and re.fullmatch(pattern, row.found)


def test_hosts_that_cannot_connect_are_named(nodes: list[Node]) -> None:
    (row,) = check_links(nodes, [None, None])  # there is no address besides that of the loopback interface
    assert (row.name, row.status) == ("node1 - node2", "fail")
    assert row.found == "node1 cannot connect to node2" and "firewall" in row.fix
