"""Check the hosts of a run: each of them, what must be equal, the network between them, and all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.supervision.cluster import host_checks
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.tools.doctor.finding import Finding, Row, failure
from ds_gpt2.tools.doctor.links import check_links
from ds_gpt2.tools.doctor.nodes import node_rows, supervisor_rows
from ds_gpt2.tools.doctor.ranks import check_ranks_on_hosts

_MAKE_EQUAL = "install the same versions and copy the same files on all hosts"


def host_rows(cluster: Cluster, words: Sequence[str], is_quick: bool, wait: Callable[[str], None]) -> Iterator[Row]:
    """Connect to the hosts and check them; yield the findings. A host that does not answer is one of them.

    Args:
        words: the settings file and the overrides.
        is_quick: only the quick checks of each host and the comparison of all hosts.
        wait: called with what is being checked.
    """
    yield from supervisor_rows(is_quick)
    wait("connecting")
    problems = cluster.connect()
    wait("checks on each host")
    of_hosts = node_rows(cluster, words, is_quick)
    for host in cluster.spec.hosts:
        yield Row("host", _connection(problems.get(host.name)), host.name)
        yield from (row for row in of_hosts if row.host == host.name)
    if not cluster.nodes:
        return
    wait("comparison")
    common = [_differences(cluster), *_devices(cluster), _directories(cluster)]
    yield from (Row("all hosts", finding) for finding in common)
    network, interfaces = _network(cluster)
    yield Row("network", network)
    if is_quick:
        return
    wait("links")
    yield from (Row("network", finding) for finding in check_links(cluster.nodes, interfaces))
    wait("ranks")
    failed = [finding.name for finding in (*common, network) if finding.status == "fail"]
    yield from (Row("ranks", finding) for finding in _ranks(cluster, [*cluster.away, *failed]))


def _connection(problem: str | None) -> Finding:
    if problem is not None:
        return failure("connection", UserError(problem))
    return Finding("connection", "ok", "the agent answers, can read settings and data, and its clock is right")


def _differences(cluster: Cluster) -> Finding:
    found = host_checks.differences(cluster.nodes)
    if found:
        return Finding("versions", "fail", "; ".join(found), _MAKE_EQUAL)
    what = "Python, the libraries, the code and the data are equal"
    return Finding("versions", "ok", f"{what} on {counted(len(cluster.nodes), 'host')}")


def _devices(cluster: Cluster) -> list[Finding]:
    """Return a finding if the hosts do not have the same kind of devices, or not enough."""
    try:
        cluster.check_devices()
    except UserError as error:
        return [failure("devices", error)]
    return []


def _directories(cluster: Cluster) -> Finding:
    try:
        cluster.check_shared()
    except UserError as error:
        return failure("directories", error)
    return Finding("directories", "ok", "run.dir and checkpoint.dir are the same on all hosts")


def _network(cluster: Cluster) -> tuple[Finding, Sequence[str | None]]:
    """Check that all hosts reach the first; return also the interface that each uses."""
    try:
        network = cluster.find_network()
    except UserError as error:
        return failure("rank 0", error), [None] * len(cluster.nodes)
    interfaces = ", ".join(sorted({name for name in network.interfaces if name is not None}))
    found = f"all hosts reach {network.address}" + (f" ({interfaces})" if interfaces else "")
    return Finding("rank 0", "ok", found), network.interfaces


def _ranks(cluster: Cluster, problems: Sequence[str]) -> list[Finding]:
    """Let all ranks sum; not where hosts do not fit each other."""
    if problems:
        return [Finding("ranks", "unknown", f"not started: fix first {', '.join(problems)}")]
    return check_ranks_on_hosts(cluster)
