"""Report which hosts of a run have stopped responding, and which respond again."""

from __future__ import annotations

from collections.abc import Mapping

from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.reporter import Reporter

_NO_CONNECTION = "connect to host"  # in the message of ssh: says no more than that the host is lost


def report_lost_hosts(
    reporter: Reporter, cluster: Cluster, reasons: Mapping[str, str], step: int | None = None
) -> list[str]:
    """Report the hosts that have stopped responding since the last report; return their names.

    Args:
        reasons: host -> why it is lost, where that is known.
        step: the newest step.
    """
    lost = cluster.newly_lost(reasons)
    for host, reason in lost.items():
        reporter.report("host_lost", f"host {host} is lost: {reason}", step, host=host, reason=reason)
    return list(lost)


def report_reconnected_hosts(
    reporter: Reporter, cluster: Cluster, before: set[str], problems: Mapping[str, str]
) -> None:
    """Report the hosts that are used again, and new reasons why others are not, each once.

    Args:
        before: the hosts that were away.
        problems: host -> why it is still away.
    """
    for host in sorted(before - set(cluster.away)):
        reporter.report("host_back", f"host {host} answers again", host=host)
    reasons = {host: reason for host, reason in problems.items() if _NO_CONNECTION not in reason}
    for host, reason in cluster.newly_lost(reasons).items():
        reporter.report("host_lost", f"host {host} cannot be used: {reason}", host=host, reason=reason)
